"""The section of a model card on files for other runtimes, from the records of recipes/export.py."""
from string import Template
from typing import Any

from .card_template import number

__all__ = ['exported_section']

EXPORTED = Template('''\
## Exported

The same network in files for other runtimes, which need neither PyTorch nor fmd-timm. Images go in as float32 (batch,
channels, height, width), normalised, and logits come out. A difference is that to PyTorch, relative to the largest
logit. The record of a file, `<file>.json`, has the versions and the command.

$table

$usage
''')

EXPORTED_USAGE = Template('''\
With $runtime, and timm for the preprocessing:

```python
import json

import $runtime
from huggingface_hub import hf_hub_download
from PIL import Image
from timm.data import create_transform

$load
names = about.pop('label_names')
transform = create_transform(**about)

image = Image.new('RGB', ($width, $height))  # yours: Image.open('image.png').convert('RGB')
images = transform(image).unsqueeze(0)
print(names[$logits[0].argmax()])
```
''')

# Of each format of recipes/export.py: the runtime, how it loads the file and what is said there about images and
# classes, and the logits.
RUNTIMES = dict(
    onnx=('onnxruntime', '''\
session = onnxruntime.InferenceSession(hf_hub_download('$repo', 'model.onnx'))
about = {name: json.loads(text) for name, text in session.get_modelmeta().custom_metadata_map.items()}''',
          "session.run(None, {'pixel_values': images.numpy()})[0]"),
    openvino=('openvino', '''\
hf_hub_download('$repo', 'model.bin')  # stands beside the other
network = openvino.Core().read_model(hf_hub_download('$repo', 'model.xml'))
about = {name: json.loads(text) for name, text in network.get_rt_info('model_info').value.items()}
compiled = openvino.compile_model(network, 'CPU')''',
              'compiled(images.numpy())[0]'),
    executorch=('executorch.runtime', '''\
program = executorch.runtime.Runtime.get().load_program(hf_hub_download('$repo', 'model.pte'))
texts = {name: program.load_method(name).execute([])[0] for name in program.method_names - {'forward'}}
about = {name: json.loads(text) for name, text in texts.items()}''',
                "program.load_method('forward').execute([images])[0]"),
)


def exported_section(records: list[dict[str, Any]], repo: str, height: int, width: int) -> str:
    """The section on files for other runtimes, from the records of recipes/export.py.

    Raises:
        ValueError: A record has no such field; names it.
    """
    if not records:
        return ''
    rows = {
        'Runtime': lambda r: f'{(name := RUNTIMES[r["format"]][0].partition(".")[0])} {r["versions"][name]}',
        'Size': lambda r: f'{sum(file["bytes"] for file in r["files"].values()) / 1e6:.1f} MB',
        'Weights': lambda r: r['weights'],
        'Images at a time': lambda r: 'any number' if (most := r['largest_batch']) is None else (
            '1' if most == 1 else f'{most} at most'),
        'Largest difference': lambda r: f'{r["largest_relative_difference"]:.1e}',
        'Same best class': lambda r: f'{number(r["top1_agreement"])} of {number(r["images"])} images',
        'Compared on': lambda r: f'`{r["compared_on"]}`',
        'Top-1 accuracy, and in PyTorch': lambda r: ', '.join(
            '-' if r[name] is None else f'{r[name]:.2f} %' for name in ('top1', 'pytorch_top1')),
        'Latency at batch 1': lambda r: number(r['infer_ms_per_image'], 'ms'),
        'Hardware': lambda r: r['device'],
    }
    try:
        lines = [
            f'| | {" | ".join(", ".join(f"`{file}`" for file in sorted(r["files"])) for r in records)} |',
            f'|---{len(records) * "|---"}|',
            *(f'| {label} | {" | ".join(cell(r) for r in records)} |' for label, cell in rows.items())]
    except KeyError as error:
        raise ValueError(f'the record of an exported file has no {error}') from error
    usages = []
    for record in records:
        runtime, load, logits = RUNTIMES[record['format']]
        usages.append(EXPORTED_USAGE.substitute(
            runtime=runtime, load=Template(load).substitute(repo=repo), logits=logits, height=height, width=width))
    return EXPORTED.substitute(table='\n'.join(lines), usage='\n'.join(usages))
