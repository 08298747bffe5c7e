"""A whole network with the authors' parameter names, written from the equations, gives the same results once loaded."""
import copy
import functools

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

from fmd_timm import load_authors_state_dict, set_temperature

KERNEL_TEMPERATURE, GATE_TEMPERATURE = 34.0, 5.0
RTOL = 1e-9  # of the largest value, float64
NARROW = dict(channels=(8, 16, 24, 32), num_classes=7, zero_init_last=False)
CASES = {  # timm's network, method, arguments
    'basic': ('resnet18', 'fmd', dict(NARROW, layers=(2, 1, 1, 1))),
    'bottleneck': ('resnet50', 'fmd', dict(NARROW, layers=(2, 1, 1, 1))),
    # hidden layers beyond 16
    'wide': ('resnet18', 'fmd', dict(NARROW, channels=(8, 16, 24, 288), layers=(1, 1, 1, 1))),
    'odconv': ('resnet50', 'od', dict(NARROW, layers=(2, 1, 1, 1))),
}


class AuthorsFMDConv2d(nn.Module):
    """FMDConv of K = 4 kernels, image by image, with the parameters named and shaped as in the authors' code."""

    def __init__(self, conv):
        super().__init__()
        K, O, I = 4, conv.out_channels, conv.in_channels
        A, h = max(I // 16, 16), I // 4 + 1
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups
        self.weight = nn.Parameter(torch.empty(K, *conv.weight.shape))
        self.bias = nn.Parameter(torch.empty(K, O))
        self.attention = nn.ModuleDict(dict(
            fc=nn.Conv2d(I, A, 1, bias=False), bn=nn.BatchNorm2d(A),
            channel_fc=nn.Conv2d(A, I, 1), filter_fc=nn.Conv2d(A, O, 1),
        ))
        self.attention2 = nn.ModuleDict(dict(fc1=nn.Conv2d(I, h, 1, bias=False), fc2=nn.Conv2d(h, K, 1)))

    def forward(self, x):
        pooled = F.adaptive_avg_pool2d(x, 1)
        hidden = self.attention['bn'](self.attention['fc'](pooled)).relu()
        in_attn = torch.sigmoid(self.attention['channel_fc'](hidden) / GATE_TEMPERATURE)  # (B, I, 1, 1)
        out_attn = torch.sigmoid(self.attention['filter_fc'](hidden) / GATE_TEMPERATURE)  # (B, O, 1, 1)
        logits = self.attention2['fc2'](self.attention2['fc1'](pooled).relu())
        kernel_attn = torch.softmax(logits.flatten(1) / KERNEL_TEMPERATURE, dim=1)  # (B, K)
        images = []
        for image, share in zip(x * in_attn, kernel_attn):
            weight = sum(share[k] * self.weight[k] for k in range(4))
            bias = sum(share[k] * self.bias[k] for k in range(4))
            images.append(F.conv2d(image, weight, bias, self.stride, self.padding, self.dilation, self.groups))
        return torch.stack(images) * out_attn


class AuthorsODConv2d(nn.Module):
    """ODConv of K = 4 kernels, image by image, with the parameters named and shaped as in the authors' code."""

    def __init__(self, conv):
        super().__init__()
        K, O, I = 4, conv.out_channels, conv.in_channels
        A, k = max(I // 16, 16), conv.kernel_size[0]
        is_depthwise = conv.groups == I == O
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups
        self.weight = nn.Parameter(torch.empty(K, *conv.weight.shape))
        self.attention = nn.ModuleDict(dict(
            fc=nn.Conv2d(I, A, 1, bias=False), bn=nn.BatchNorm2d(A), channel_fc=nn.Conv2d(A, I, 1),
            kernel_fc=nn.Conv2d(A, K, 1),
        ))
        if not is_depthwise:
            self.attention['filter_fc'] = nn.Conv2d(A, O, 1)
        if k > 1:
            self.attention['spatial_fc'] = nn.Conv2d(A, k * k, 1)

    def forward(self, x):
        hidden = self.attention['bn'](self.attention['fc'](F.adaptive_avg_pool2d(x, 1))).relu()
        logits = {key: fc(hidden) / KERNEL_TEMPERATURE for key, fc in self.attention.items() if key.endswith('_fc')}
        kernel_attn = torch.softmax(logits['kernel_fc'].flatten(1), dim=1)  # (B, K)
        taps = torch.ones(len(x), *self.weight.shape[3:], dtype=x.dtype)
        if 'spatial_fc' in logits:
            taps = torch.sigmoid(logits['spatial_fc']).view_as(taps)
        images = []
        for image, share, tap in zip(x * torch.sigmoid(logits['channel_fc']), kernel_attn, taps):
            weight = tap * sum(share[k] * self.weight[k] for k in range(4))
            images.append(F.conv2d(image[None], weight, None, self.stride, self.padding, self.dilation, self.groups)[0])
        y = torch.stack(images)
        return y * torch.sigmoid(logits['filter_fc']) if 'filter_fc' in logits else y


@functools.cache
def run_theirs(case, training):
    """The weights of their network, and what `run` finds with it."""
    name, method, args = CASES[case]
    theirs = make_theirs(name, AuthorsODConv2d if method == 'od' else AuthorsFMDConv2d, **args)
    state_dict = copy.deepcopy(theirs.state_dict())
    return state_dict, run(theirs, training)


def run(network, training):
    """Logits and gradient of random images, and all statistics afterwards."""
    torch.manual_seed(1)
    images = torch.randn(3, 3, 64, 64, dtype=torch.float64, requires_grad=True)
    logits = network.train(training)(images)
    logits.square().sum().backward()
    statistics = {key: value for key, value in network.state_dict().items() if '.running_' in key}
    return dict(statistics, logits=logits, gradient=images.grad)


def make_theirs(name, layer=AuthorsFMDConv2d, **kwargs):
    """timm's ResNet with `layer` in its residual blocks, every parameter and statistic random."""
    model = timm.create_model(name, **kwargs)
    for stage in model.layer1, model.layer2, model.layer3, model.layer4:
        for block in stage:
            for key, conv in list(block.named_children()):
                if isinstance(conv, nn.Conv2d):
                    setattr(block, key, layer(conv))
    make_random(model)
    return model


def make_random(model):
    """Every parameter and statistic, in float64."""
    model.double()
    torch.manual_seed(0)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if key.endswith('num_batches_tracked'):
                tensor.fill_(3)
            elif key.endswith('running_var') or 'bn' in key and key.endswith('weight'):
                tensor.uniform_(0.5, 1.5)
            elif tensor.ndim == 5:  # of every kernel
                tensor.normal_(std=(2 / tensor[0, 0].numel()) ** 0.5)
            elif tensor.ndim == 4:
                tensor.normal_(std=(2 / tensor[0].numel()) ** 0.5)
            else:
                tensor.normal_()


def assert_close(actual, expected):
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error < RTOL, f'relative error {error:.1e}'


@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
@pytest.mark.parametrize('case', CASES)
def test_network_with_the_authors_checkpoint_equals_theirs(case, training, implementation):
    state_dict, expected = run_theirs(case, training)
    name, method, args = CASES[case]
    model = timm.create_model(f'{name}_{method}', conv_bias=method == 'fmd', **args).double()
    load_authors_state_dict(model, state_dict)
    set_temperature(model, kernel=KERNEL_TEMPERATURE, gate=GATE_TEMPERATURE)
    found = run(model, training)
    for key, value in expected.items():
        assert_close(found[key], value)


class AuthorsMobileNetV2(nn.Module):
    """torchvision's names: every layer but the last of a block is a Sequential of convolution, BatchNorm and ReLU6."""

    def __init__(self, blocks, num_classes):
        super().__init__()

        def layer(inputs, outputs, kernel_size=1, stride=1, groups=1, wrap=AuthorsODConv2d):
            conv = nn.Conv2d(inputs, outputs, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
            return nn.Sequential(wrap(conv), nn.BatchNorm2d(outputs), nn.ReLU6())

        features, channels = [layer(3, 16, 3, 2, wrap=lambda conv: conv)], 16
        for ratio, outputs, stride in blocks:
            hidden = ratio * channels
            expansion = [layer(channels, hidden)] if ratio > 1 else []
            projection = layer(hidden, outputs)[:2]
            block = nn.Module()
            block.conv = nn.Sequential(*expansion, layer(hidden, hidden, 3, stride, hidden), *projection)
            features.append(block)
            channels = outputs
        self.features = nn.Sequential(*features, layer(channels, 1280))
        self.classifier = nn.Sequential(nn.Dropout(), nn.Linear(1280, num_classes))

    def forward(self, x):
        for block in self.features:
            y = block.conv(x) if hasattr(block, 'conv') else block(x)
            x = x + y if x.shape == y.shape else y
        return self.classifier(x.mean((2, 3)))


def test_a_mobilenetv2_of_odconv_equals_theirs():
    stages = [(1, 8, 1, 1), (6, 16, 1, 2), (6, 16, 1, 2), (6, 32, 2, 2), (6, 48, 1, 1), (6, 80, 1, 2), (6, 160, 1, 1)]
    blocks = [(ratio, outputs, 1 if i else stride) for ratio, outputs, n, stride in stages for i in range(n)]
    theirs = AuthorsMobileNetV2(blocks, num_classes=7)
    make_random(theirs)
    model = timm.create_model('mobilenetv2_050_od', num_classes=7, depth_multiplier=0.3).double()
    load_authors_state_dict(model, theirs.state_dict())
    set_temperature(model, kernel=KERNEL_TEMPERATURE, gate=GATE_TEMPERATURE)
    expected = run(theirs, training=False)
    found = run(model, training=False)
    assert_close(found['logits'], expected['logits'])
    assert_close(found['gradient'], expected['gradient'])
    state_dict = dict(theirs.state_dict(), extra=torch.ones(1))
    del state_dict['features.1.conv.1.weight']
    with pytest.raises(ValueError, match=r"missing keys \['blocks.0.0.conv_pw.weight'\], unexpected keys \['extra'\]"):
        load_authors_state_dict(model, state_dict)


def test_network_without_bias_refuses_the_checkpoint_and_names_the_biases():
    model = timm.create_model('resnet18_fmd', **NARROW)
    message = r"missing keys \[\], unexpected keys \['layer1.0.conv1.bias', 'layer1.0.conv2.bias', "
    with pytest.raises(ValueError, match=message):
        load_authors_state_dict(model, make_theirs('resnet18', **NARROW).state_dict())
