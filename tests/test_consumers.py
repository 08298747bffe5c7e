"""Where timm models are used: libraries that take a backbone or a classifier by its timm name take ours.

The libraries come with `pip install '.[test,consumers]'`; the tests of one that is missing are skipped.
"""
import json
from collections import OrderedDict

import numpy as np
import publish
import pytest
import timm
import torch
import torch.nn.functional as F
from hub_server import WRITE_TOKEN
from inputs import make_run
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork
from transformers import (
    TimmBackbone,
    TimmBackboneConfig,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    Trainer,
    TrainingArguments,
)

from fmd_timm import DynamicConv2d, set_temperature
from fmd_timm.hub import save_for_hub
from fmd_timm.layers import annealed_temperature

pytestmark = [
    pytest.mark.consumers,
    pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning'),  # theirs
]

NARROW = dict(channels=(8, 16, 32, 64), layers=(1, 1, 1, 1))
NETWORKS = {  # of each method, of each family
    'resnet18_cond': NARROW, 'resnet18_dy': NARROW, 'resnet18_od': NARROW, 'resnet18_fmd': NARROW,
    'mobilenetv3_small_100_fmd': {},
}


def trained(name, **kwargs):
    """A narrow model with temperatures and statistics of its BatchNorms that no fresh model has."""
    torch.manual_seed(0)
    model = timm.create_model(name, **NARROW, zero_init_last=False, **kwargs)
    set_temperature(model, kernel=3.0)
    model(2 * torch.randn(4, model.in_chans, 64, 64) + 1)
    return model.eval()


def losses_of(step, steps, parameters):
    """What `step()` returns before each of so many steps of SGD."""
    optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9)
    losses = []
    for _ in range(steps):
        loss = step()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_state_of(model, expected):
    """`model` has all that is in the state_dict `expected`, temperatures and statistics too."""
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


@pytest.fixture(scope='module')
def digits():
    """96 real handwritten digits: images (96, 3, 16, 16) and labels (96,)"""
    data = load_digits()
    images = torch.from_numpy(data.images[:96] / 8 - 1).float()
    return F.interpolate(images[:, None], scale_factor=2.0).repeat(1, 3, 1, 1), torch.from_numpy(data.target[:96])


# segmentation_models_pytorch


@pytest.mark.parametrize('name,args', NETWORKS.items(), ids=NETWORKS)
def test_unet_of_segmentation_models_pytorch_learns(name, args):
    smp = pytest.importorskip('segmentation_models_pytorch')
    torch.manual_seed(0)
    model = smp.Unet(f'tu-{name}', encoder_weights=None, classes=1, **args)
    set_temperature(model, kernel=30.0)  # as training from random weights starts: all kernels learn
    masks = torch.zeros(2, 1, 64, 96)
    masks[0, :, 10:40, 50:90] = masks[1, :, 30:60, 5:35] = 1
    images = masks + 0.1 * torch.randn(2, 3, 64, 96)
    losses = losses_of(lambda: F.binary_cross_entropy_with_logits(model(images), masks), 6, model.parameters())
    assert losses[-1] < 0.7 * losses[0]
    layers = [module for module in model.encoder.modules() if isinstance(module, DynamicConv2d)]
    gradients = [layer.weight.grad.view(layer.num_kernels, -1) for layer in layers]
    assert layers and all(gradient.any(dim=1).all() for gradient in gradients)


@pytest.mark.parametrize('channels', [1, 3])
def test_deeplab_of_segmentation_models_pytorch_starts_from_a_static_checkpoint_at_stride_16(channels, tmp_path):
    smp = pytest.importorskip('segmentation_models_pytorch')
    static = timm.create_model('resnet18', zero_init_last=False)
    static(2 * torch.randn(4, 3, 64, 64) + 1)
    save_file(static.state_dict(), tmp_path / 'model.safetensors')
    weights = dict(pretrained_cfg_overlay=dict(file=str(tmp_path / 'model.safetensors')))
    model = smp.DeepLabV3Plus(
        'tu-resnet18_fmd', encoder_weights=True, in_channels=channels, classes=5, encoder_output_stride=16, **weights)
    reference = timm.create_model(
        'resnet18', pretrained=True, in_chans=channels, features_only=True, output_stride=16, **weights)
    images = torch.randn(1, channels, 64, 96)
    with torch.no_grad():
        assert model.eval()(images).shape == (1, 5, 64, 96)
        features = model.encoder(images)
        # another summation order in each of 17 convolutions
        torch.testing.assert_close(features[1:], reference.eval()(images), rtol=1e-4, atol=1e-4)
    assert [f.shape[3] for f in features] == [96, 48, 24, 12, 6, 6]


# transformers


@pytest.mark.parametrize('name, args', NETWORKS.items(), ids=NETWORKS)
def test_timm_backbone_of_transformers_returns_the_features(name, args):
    indices = (1, 2, 3, 4)
    backbone = TimmBackbone(TimmBackboneConfig(backbone=name, out_indices=indices), **args).eval()
    features = timm.create_model(name, features_only=True, out_indices=indices, **args).eval()
    features.load_state_dict(backbone._backbone.state_dict())
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        maps = list(backbone(images).feature_maps)
        torch.testing.assert_close(maps, features(images))
    assert backbone.channels == [feature_map.shape[1] for feature_map in maps]
    assert [images.shape[3] // feature_map.shape[3] for feature_map in maps] == [4, 8, 16, 32]


def test_pretrained_timm_backbone_of_transformers_keeps_statistics_that_are_frozen(tmp_path):
    model = trained('resnet18_fmd')
    save_for_hub(model, tmp_path)
    config = TimmBackboneConfig(
        backbone=f'local-dir:{tmp_path}', out_indices=(1, 4), freeze_batch_norm_2d=True)
    backbone = TimmBackbone(config, pretrained=True)._backbone.state_dict()
    kept = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith('fc.')}
    assert all(key.endswith('.num_batches_tracked') for key in kept.keys() - backbone.keys())
    assert all(torch.equal(tensor, kept[key]) for key, tensor in backbone.items())


def test_trainer_of_transformers_fine_tunes_and_saves(tmp_path, digits):
    torch.manual_seed(0)
    fresh = timm.create_model('resnet18_fmd_cifar', **NARROW)
    set_temperature(fresh, kernel=3.0)
    save_for_hub(fresh, tmp_path / 'timm')
    model = TimmWrapperForImageClassification.from_pretrained(tmp_path / 'timm')
    arguments = TrainingArguments(
        tmp_path / 'transformers', max_steps=15, per_device_train_batch_size=32, learning_rate=0.01,
        lr_scheduler_type='constant', logging_steps=1, save_strategy='no', report_to=[], use_cpu=True,
        disable_tqdm=True,
    )
    images = [dict(pixel_values=image, labels=label) for image, label in zip(*digits)]
    trainer = Trainer(model, arguments, train_dataset=images)
    trainer.train()
    losses = [entry['loss'] for entry in trainer.state.log_history if 'loss' in entry]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    trainer.save_model()
    again = TimmWrapperForImageClassification.from_pretrained(tmp_path / 'transformers')
    assert_state_of(again, model.state_dict())
    assert again.timm_model.layer1[0].conv1.attention.kernel_temperature.item() == 3


def test_timm_wrapper_of_transformers_takes_a_new_classifier(tmp_path):
    model = trained('resnet18_fmd_cifar')
    save_for_hub(model, tmp_path)
    other = TimmWrapperForImageClassification.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert other(torch.randn(2, 3, 32, 32)).logits.shape == (2, 7)
    expected = {**model.state_dict(), 'fc.weight': other.timm_model.fc.weight, 'fc.bias': other.timm_model.fc.bias}
    assert_state_of(other.timm_model, expected)


def test_timm_wrapper_of_transformers_makes_an_untrained_model():
    config = TimmWrapperConfig(architecture='resnet18_fmd_cifar', num_labels=4, model_args=dict(NARROW))
    assert TimmWrapperForImageClassification(config)(torch.randn(2, 3, 32, 32)).logits.shape == (2, 4)


def test_transformers_loads_a_published_repository(hub, tmp_path, monkeypatch):
    make_run(tmp_path, **NARROW)
    monkeypatch.setenv('HF_TOKEN', WRITE_TOKEN)
    publish.main(**vars(publish.parse_publish(['--run', str(tmp_path), '--repo', 'ann/small'])))
    weights, (images, logits) = load_file(tmp_path / 'model.safetensors'), torch.load(tmp_path / 'logits.pt')
    model = TimmWrapperForImageClassification.from_pretrained('ann/small').eval()
    assert_state_of(model.timm_model, weights)
    with torch.no_grad():
        torch.testing.assert_close(model(images).logits, logits)

    config = TimmBackboneConfig(backbone='hf-hub:ann/small', out_indices=(1, 4), freeze_batch_norm_2d=True)
    backbone = TimmBackbone(config, pretrained=True)
    for key, tensor in backbone._backbone.state_dict().items():
        assert torch.equal(tensor, weights[key]), key


# torchvision


class Pyramid(torch.nn.Module):
    """A feature pyramid over the four stages of a timm model, as torchvision's detectors take it."""

    def __init__(self, name, freeze_batch_norm, out_channels=32):
        super().__init__()
        self.body = timm.create_model(name, features_only=True, out_indices=(1, 2, 3, 4), **NARROW)
        if freeze_batch_norm:
            self.body = timm.layers.freeze_batch_norm_2d(self.body)
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), out_channels)
        self.out_channels = out_channels

    def forward(self, x):
        return self.fpn(OrderedDict(zip('0123', self.body(x))))


@pytest.mark.parametrize('images_per_step, freeze_batch_norm', [
    (2, False), (1, True),
    pytest.param(1, False, marks=pytest.mark.slow), pytest.param(2, True, marks=pytest.mark.slow)])
def test_faster_rcnn_of_torchvision_learns_from_images_of_different_size(images_per_step, freeze_batch_norm):
    torch.manual_seed(0)
    model = FasterRCNN(
        Pyramid('resnet18_fmd', freeze_batch_norm), num_classes=3, min_size=64, max_size=96,
        rpn_anchor_generator=AnchorGenerator(((8,), (16,), (32,), (64,)), ((0.5, 1.0, 2.0),) * 4),
        rpn_post_nms_top_n_train=64, rpn_post_nms_top_n_test=64, box_batch_size_per_image=64,
    )
    images = [torch.rand(3, 64, 96), torch.rand(3, 80, 64)][:images_per_step]
    targets = [
        dict(boxes=torch.tensor([[8.0, 8, 40, 40]]), labels=torch.tensor([1])),
        dict(boxes=torch.tensor([[20.0, 4, 60, 44], [4, 50, 24, 76]]), labels=torch.tensor([2, 1])),
    ][:images_per_step]
    losses = losses_of(lambda: sum(model(images, targets).values()), 6, model.parameters())
    assert losses[-1] < 0.7 * losses[0]
    with torch.no_grad():
        detections = model.eval()(images)
    assert [set(detection) for detection in detections] == [{'boxes', 'labels', 'scores'}] * images_per_step


# Lightning and fastai


def test_lightning_trains_with_an_annealed_temperature(digits, tmp_path):
    lightning = pytest.importorskip('lightning')

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = timm.create_model('resnet18_fmd_cifar', **NARROW)
            self.losses, self.temperatures = [], []

        def training_step(self, batch, batch_idx):
            images, labels = batch
            loss = F.cross_entropy(self.model(images), labels)
            self.losses.append(loss.item())
            self.temperatures.append(self.model.layer1[0].conv1.attention.kernel_temperature.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    class AnnealTemperature(lightning.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            set_temperature(module, kernel=annealed_temperature(trainer.global_step / trainer.max_steps, 30, 0.5))

    lightning.seed_everything(0, verbose=False)
    module = Classifier()
    trainer = lightning.Trainer(
        max_steps=12, accelerator='cpu', callbacks=[AnnealTemperature()], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )
    trainer.fit(module, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*digits), batch_size=32))
    assert sum(module.losses[-3:]) < 0.8 * sum(module.losses[:3])
    assert module.temperatures[0] == 30 and module.temperatures[-1] == 1
    assert sorted(module.temperatures, reverse=True) == module.temperatures


@pytest.fixture
def digit_files(digits, tmp_path):
    """The digits as a folder of PNG files per class."""
    for number, (image, label) in enumerate(zip(*digits)):
        folder = tmp_path / 'digits' / str(label.item())
        folder.mkdir(parents=True, exist_ok=True)
        pixels = ((image + 1) * 127.5).permute(1, 2, 0).numpy().astype(np.uint8)
        Image.fromarray(pixels).save(folder / f'{number}.png')
    return tmp_path / 'digits'


def test_fastai_learner_trains_with_an_annealed_temperature(digit_files):
    vision = pytest.importorskip('fastai.vision.all')

    class AnnealTemperature(vision.Callback):
        def before_batch(self):
            if self.training:
                set_temperature(self.learn.model, kernel=annealed_temperature(self.pct_train, 30, 0.5))

    vision.set_seed(0)
    loaders = vision.ImageDataLoaders.from_folder(digit_files, valid_pct=0.25, bs=16, num_workers=0)
    learner = vision.vision_learner(
        loaders, 'resnet18_fmd_cifar', pretrained=False, cbs=AnnealTemperature(), **NARROW)
    with learner.no_bar(), learner.no_logging():
        learner.fit(3, 0.01)
    losses = [loss.item() for loss in learner.recorder.losses]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert learner.model[0].model.layer1[0].conv1.attention.kernel_temperature.item() == 1


def test_fastai_learner_freezes_the_pretrained_body(digit_files, tmp_path):
    vision = pytest.importorskip('fastai.vision.all')
    model = trained('resnet18_fmd_cifar')
    save_for_hub(model, tmp_path / 'model')
    loaders = vision.ImageDataLoaders.from_folder(digit_files, valid_pct=0.25, bs=16, num_workers=0)
    learner = vision.vision_learner(
        loaders, 'resnet18_fmd_cifar', pretrained_cfg_overlay=dict(file=str(tmp_path / 'model/model.safetensors')),
        train_bn=False, **NARROW)
    with learner.no_bar(), learner.no_logging():
        learner.fit(1)
    body = learner.model[0].model
    for key, parameter in body.named_parameters():
        assert torch.equal(parameter, model.get_parameter(key)), key
    assert body.layer1[0].conv1.attention.kernel_temperature.item() == 3
    normalize, = loaders.after_batch.fs.filter(vision.risinstance(vision.Normalize))
    torch.testing.assert_close(normalize.mean.flatten(), torch.tensor(json.loads(
        (tmp_path / 'model/config.json').read_text())['pretrained_cfg']['mean']))
