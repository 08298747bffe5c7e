"""The text of a model card, and how numbers stand in it; `model_card.py` fills it in from a run record.

Its sections and their order are those of timm's cards on the Hub, as timm's `generate_readme` writes them.
"""
import math
from string import Template


def number(value: float | None, unit: str = '') -> str:
    """Four significant digits or all before the point: 12,346 or 0.01235."""
    if value is None:
        return '-'
    digits = 0 if isinstance(value, int) else 3 - math.floor(math.log10(abs(value) or 1.))
    return f'{value:,.{max(digits, 0)}f} {unit}'.rstrip()


def percent(share: float | None) -> str:
    return '-' if share is None else f'{100 * share:.1f} %'


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

DESCRIPTION = Template('''\
`$model`, an image classifier with $convolutions, trained on `$dataset`.
It is a model for [timm](https://github.com/huggingface/pytorch-image-models): the package
[fmd-timm](https://pypi.org/project/fmd-timm/) registers its architecture there.

$table
''')

USAGE = Template('''\
```bash
pip install fmd-timm
```

### Image Classification
```python
import fmd_timm  # registers the architecture with timm
import timm
import torch
from PIL import Image

image = Image.new('$mode', ($width, $height))  # yours: Image.open('image.png').convert('$mode')

model = timm.create_model('hf-hub:$repo', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)

with torch.no_grad():
    probabilities = model(transform(image).unsqueeze(0)).softmax(dim=-1)[0]
labels = model.pretrained_cfg.get('label_names') or range(model.num_classes)
for probability, index in zip(*probabilities.topk($topk)):
    print(f'{labels[index]}: {probability:.1%}')
```

### Feature Map Extraction
```python
backbone = timm.create_model('hf-hub:$repo', pretrained=True, features_only=True).eval()
with torch.no_grad():
    feature_maps = backbone(transform(image).unsqueeze(0))  # a list, the largest map first
for feature_map in feature_maps:
    print(feature_map.shape)
```

### Image Embeddings
```python
embedder = timm.create_model('hf-hub:$repo', pretrained=True, num_classes=0).eval()  # no classifier
with torch.no_grad():
    embedding = embedder(transform(image).unsqueeze(0))  # (1, features)
```

### Image Classification with transformers
```python
from transformers import AutoModelForImageClassification

wrapped = AutoModelForImageClassification.from_pretrained('$repo').eval()  # after import fmd_timm, too
with torch.no_grad():
    logits = wrapped(transform(image).unsqueeze(0)).logits
```
''')

COMPARISON = Template('''\
With its static twin, trained by the same recipe with the same seed on the same hardware. `top1` and `top5` are in
percent, `img_size` in pixels, `param_count` and `macts` (activations) in millions, `samples_per_sec` of inference in
batches of `batch_size`, `epoch` is the median of a training epoch in seconds.

$table

One run of each: the spread over seeds is not known from them.
''')

REST = Template('''\

$exported## Training

The recipes are in the source distribution of fmd-timm:

```bash
pip download --no-deps --no-binary fmd-timm '$package' && tar xf fmd_timm-*.tar.gz && cd fmd_timm-*/
pip install '.[recipes]'
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
## Licence

$licence

## Citation
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
