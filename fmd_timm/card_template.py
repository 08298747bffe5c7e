"""The text of a model card; `model_card.py` fills it in from a run record."""
from string import Template

TABLE = Template('''\
| | |
|---|---|
| Top-1 accuracy | $top1 % |
| Top-5 accuracy | $top5 % |
| Cross-entropy | $loss |
| Validation images | $validation_images |
| Training epoch, median | $median_epoch_seconds |
| Share of it that the device waited for images, at most | $data_wait_share |
| IES, training: epoch time / top-1 as a fraction | $ies |
| RCS, training: top-1 as a fraction / epoch time | $rcs |
| IES, inference: time per correct image | $ies_infer |
| RCS, inference: correct images per second | $rcs_infer |
| Throughput, training | $train_images_per_second |
| Throughput, inference, batch $infer_batch | $infer_images_per_second |
| Peak memory | $peak_memory_mib |
| Parameters | $parameters |
| GMACs | $gmacs |
$dynamics| Hardware | $device_count x $device |
| Precision | $precision |
| Input (channels, height, width) | $input_size |
| Global batch | $global_batch |
''')

# Of a dynamic network, over at most 1,024 validation images, medians of its layers
DYNAMICS = {
    'kernel_entropy': 'Entropy of the kernel attention: 1 where all kernels count equally, 0 where one does',
    'gate_std': 'Standard deviation of a gate over the images',
    'kernel_distance': 'Distance of a kernel from the mean of the kernels, relative to its norm',
}

CARD = Template('''
# $name

`$model`, an image classifier with $convolutions, trained on `$dataset`.
It is a model for [timm](https://github.com/huggingface/pytorch-image-models): the package
[fmd-timm](https://pypi.org/project/fmd-timm/) registers its architecture there.

$table

## Usage

```bash
pip install fmd-timm
```

```python
import fmd_timm  # registers the architecture with timm
import timm
import torch
from PIL import Image

model = timm.create_model('hf-hub:$repo', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)

image = Image.new('$mode', ($width, $height))  # yours: Image.open('image.png').convert('$mode')
with torch.no_grad():
    probabilities = model(transform(image).unsqueeze(0)).softmax(dim=-1)[0]
labels = model.pretrained_cfg.get('label_names') or range(model.num_classes)
for probability, index in zip(*probabilities.topk($topk)):
    print(f'{labels[index]}: {probability:.1%}')
```

The same network in transformers, which also needs `import fmd_timm` first:

```python
from transformers import AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained('$repo').eval()
with torch.no_grad():
    logits = model(transform(image).unsqueeze(0)).logits
```

$exported## Training

```bash
$command
```

| | |
|---|---|
| Architecture | `$model`, $model_args |
| Started from | $init |
| Teacher | $teacher |
| Dataset | `$dataset`, $num_classes classes |
| Training split | `$train_split`, $train_images images |
| Validation split | `$validation_split`, $validation_images images |
| Images that could not be read and were left out | $unread_images |
| Preset | $preset |
| Epochs | $epochs |
| Seed | $seed |
| Versions | $versions |
| Code | $git_commit |
| Finished | $finished |

`result.json` is the whole record of the run, with every setting of the recipe.

$differences## Limits

- One run with one seed: the spread over seeds is not known from it.
- Times, throughputs and scores compare only on the same hardware, with the same precision, resolution and batch. IES
  and RCS of training are reciprocals of each other and don't count the epochs.
- Accuracy was measured on `$dataset` only.
$legs
## Licence and citation

$licence

```bibtex
$article@misc{rw2019timm,
  title = {{PyTorch} Image Models},
  author = {Ross Wightman},
  year = {2019},
  publisher = {GitHub},
  doi = {10.5281/zenodo.4414861},
  howpublished = {\\url{https://github.com/huggingface/pytorch-image-models}}
}
```
''')

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

ARTICLE = '''\
@article{zhang2025fmdconv,
  title = {{FMDConv}: Fast Multi-Attention Dynamic Convolution via Speed-Accuracy Trade-off},
  author = {Zhang, Tianyu and Wan, Fan and Duan, Haoran and Tong, Kevin W. and Deng, Jingjing and Long, Yang},
  journal = {Knowledge-Based Systems},
  volume = {317},
  pages = {113393},
  year = {2025},
  doi = {10.1016/j.knosys.2025.113393},
  eprint = {2503.17530},
  archivePrefix = {arXiv}
}
'''
