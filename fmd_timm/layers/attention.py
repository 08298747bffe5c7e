"""What the dynamic convolutions differ in: pooled features -> weights of kernels, channels and kernel taps.

    CondConv  arXiv 1904.04971       kernels (sigmoid)
    DyConv    arXiv 1912.03458       kernels (softmax)
    ODConv    ICLR 2022              kernels (softmax), input channels, output channels, kernel taps (sigmoid)
    FMDConv   arXiv 2503.17530       kernels (softmax), input channels, output channels (sigmoid)

Each is pooling, `squeeze`, `bn` where the method has one, ReLU, and last linear maps (CondConv: only the last). They
differ from the authors' codes in form only: maps of the same input are one linear map, so that the branch costs few
launches, and a training batch of one image uses the running statistics of the BatchNorm instead of failing.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    'CondConvAttention', 'DyConvAttention', 'DynamicAttention', 'FMDAttention', 'ODConvAttention', 'set_temperature',
]

# kernel_attn (B, K), in_attn (B, C_in), out_attn (B, C_out), tap_attn (B, kh * kw); None is 1 everywhere
Attention = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class PooledBatchNorm(nn.BatchNorm1d):
    """BatchNorm over pooled features (B, C) that uses its running statistics for a training batch of 0 or 1 images.

    One pooled value has no variance. Statistics over more images than one process has (`nn.SyncBatchNorm`) are still
    possible: `convert_sync_batchnorm` replaces this module as any other BatchNorm.
    """

    def forward(self, x: Tensor) -> Tensor:
        use_batch = False
        if self.training and x.shape[0] > 1:  # a branch: batch_norm takes no symbolic bool (torch.compile)
            use_batch = True
            self.num_batches_tracked.add_(1)
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, use_batch, self.momentum, self.eps)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _check_ratios(**ratios: float) -> None:
    for name, value in ratios.items():
        if value < 0:
            raise ValueError(f'{name} must not be negative, got {value}')


class DynamicAttention(nn.Module):
    """Base class: images (B, C_in, H, W) -> (kernel_attn, in_attn, out_attn, tap_attn) of `fmd_timm.dynamic_conv2d`.

    The attention is float32 also under autocast and in half-precision models (float64 in float64 models).

    All four are constructed from the sizes of the convolution, in_channels, out_channels (None where out_attn is not
    wanted), kernel_size (height, width) and num_kernels, and from widths of their own.
    """
    last_layers = ()  # names of the linear maps in front of sigmoid and softmax

    def reset_parameters(self) -> None:
        """Initialise as the method's authors do, temperatures 1."""
        raise NotImplementedError(f'{type(self).__name__} has no rule for its initial values')

    def fold(self) -> nn.Module:
        """What computes the same in evaluation mode, at these temperatures, in fewer operations."""
        return self

    @torch.no_grad()
    def make_constant(self) -> None:
        """Zero the last linear maps: every image gets equal shares of the kernels and gates of sigmoid(0) = 1/2.

        At any temperature. The attention of `fmd_timm.inflate` starts so, and learns from there.
        """
        for name in self.last_layers:
            layer = getattr(self, name)
            layer.weight.zero_()
            layer.bias.zero_()


class CondConvAttention(DynamicAttention):
    """Routing of CondConv (arXiv 1904.04971): kernel_attn = sigmoid(R g + r) for the pooled input g (B, C_in).

    The shares of the kernels do not compete and do not sum to 1. There is no squeeze and no temperature.

    Args:
        in_channels: C_in.
        out_channels: Not used, nor is `kernel_size`.
        kernel_size: See above.
        num_kernels: K. One kernel has its gate too.
    """
    last_layers = 'kernel',

    def __init__(
            self,
            in_channels: int,
            out_channels: int | None,
            kernel_size: tuple[int, int],
            num_kernels: int = 4,
            device=None,
            dtype=None,
    ):
        super().__init__()
        self.num_kernels = num_kernels
        self.squeeze = nn.Identity()
        self.kernel = nn.Linear(in_channels, num_kernels, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as TensorFlow's and timm's CondConv networks do: uniform in +-1 / sqrt(C_in + K), zero bias."""
        bound = 1 / (self.kernel.in_features + self.kernel.out_features) ** 0.5
        nn.init.uniform_(self.kernel.weight, -bound, bound)
        nn.init.zeros_(self.kernel.bias)

    def fold(self) -> 'FoldedAttention':
        return FoldedAttention(None, None, _linear_map(self.kernel), competes=False)

    def forward(self, x: Tensor) -> Attention:
        logits = self.kernel(self.squeeze(x.mean((2, 3))))
        return torch.sigmoid(_at_least_float32(logits)), None, None, None

    def extra_repr(self) -> str:
        return f'num_kernels={self.num_kernels}'


class DyConvAttention(DynamicAttention):
    """Attention over the kernels of Dynamic Convolution (arXiv 1912.03458).

    For the pooled input g (B, C_in):  kernel_attn = softmax((V2 relu(V1 g) + v) / kernel_temperature).

    The temperature is a buffer of shape (1,), saved with the weights; `set_temperature` changes it.

    Args:
        in_channels: C_in.
        out_channels: Not used, nor is `kernel_size`.
        kernel_size: See above.
        num_kernels: K. One kernel has no attention and no parameters for it.
        kernel_ratio: V1 g is max(int(C_in * kernel_ratio), K) wide. 1/4 as in the paper.
    """
    kernel_temperature: Tensor

    def __init__(
            self,
            in_channels: int,
            out_channels: int | None,
            kernel_size: tuple[int, int],
            num_kernels: int = 4,
            kernel_ratio: float = 1 / 4,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        _check_ratios(kernel_ratio=kernel_ratio)
        self.num_kernels = num_kernels
        self.kernel_hidden = max(int(in_channels * kernel_ratio), num_kernels) if num_kernels > 1 else 0
        self.squeeze, self.kernel = nn.Identity(), nn.Identity()
        if num_kernels > 1:
            self.last_layers = 'kernel',
            self.squeeze = nn.Linear(in_channels, self.kernel_hidden, bias=False, **dd)
            self.kernel = nn.Linear(self.kernel_hidden, num_kernels, **dd)
        self.register_buffer('kernel_temperature', torch.ones(1, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming normal with each map's fan-out, zero bias, temperature 1, as FMDConv's kernel attention."""
        if self.num_kernels > 1:
            for layer in self.squeeze, self.kernel:
                nn.init.kaiming_normal_(layer.weight, mode='fan_out', nonlinearity='relu')
            nn.init.zeros_(self.kernel.bias)
        nn.init.ones_(self.kernel_temperature)

    def fold(self) -> 'FoldedAttention':
        if self.num_kernels == 1:
            return FoldedAttention(None, None, None)
        return FoldedAttention(
            _linear_map(self.squeeze), None, _linear_map(self.kernel, temperature=self.kernel_temperature))

    def forward(self, x: Tensor) -> Attention:
        kernel_attn: Tensor | None = None
        if self.num_kernels > 1:
            logits = self.kernel(self.squeeze(x.mean((2, 3))).relu())
            kernel_attn = F.softmax(_at_least_float32(logits) / _at_least_float32(self.kernel_temperature), dim=1)
        return kernel_attn, None, None, None

    def extra_repr(self) -> str:
        return f'num_kernels={self.num_kernels}'


class ODConvAttention(DynamicAttention):
    """The four attentions of ODConv (Omni-Dimensional Dynamic Convolution, ICLR 2022).

    For the pooled input g (B, C_in), with A, F, S, V the parts of `heads`, in this order:

        h = relu(BN(R g)),  in_attn = sigmoid((A h + a) / T),  out_attn = sigmoid((F h + f) / T),
        tap_attn = sigmoid((S h + s) / T),  kernel_attn = softmax((V h + v) / T)

    ODConv has one temperature T for all four, the buffer `kernel_temperature` of shape (1,), saved with the weights.

    Args:
        in_channels: C_in.
        out_channels: C_out; None where out_attn is not wanted (depthwise convolutions: it would equal in_attn).
        kernel_size: Height and width. A kernel of one tap has no tap_attn.
        num_kernels: K. One kernel has no kernel attention and no parameters for it.
        reduction: h is max(int(C_in * reduction), 16) wide, as in the authors' code.
    """
    kernel_temperature: Tensor
    last_layers = 'heads',

    def __init__(
            self,
            in_channels: int,
            out_channels: int | None,
            kernel_size: tuple[int, int],
            num_kernels: int = 4,
            reduction: float = 1 / 16,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        _check_ratios(reduction=reduction)
        self.in_channels = in_channels
        self.out_channels = out_channels or 0
        self.num_taps = kernel_size[0] * kernel_size[1] if kernel_size != (1, 1) else 0
        self.num_kernels = num_kernels
        self.hidden = max(int(in_channels * reduction), 16)
        self.sizes = [in_channels, self.out_channels, self.num_taps, num_kernels if num_kernels > 1 else 0]

        self.squeeze = nn.Linear(in_channels, self.hidden, bias=False, **dd)
        self.bn = PooledBatchNorm(self.hidden, **dd)
        self.heads = nn.Linear(self.hidden, sum(self.sizes), **dd)
        self.register_buffer('kernel_temperature', torch.ones(1, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the authors do: Kaiming normal with each part's own fan-out, zero biases, temperature 1."""
        for part in self.squeeze.weight, *self.heads.weight.split(self.sizes):
            if part.numel() > 0:
                nn.init.kaiming_normal_(part, mode='fan_out', nonlinearity='relu')
        nn.init.zeros_(self.heads.bias)
        self.bn.reset_parameters()
        nn.init.ones_(self.kernel_temperature)

    def fold(self) -> 'FoldedAttention':
        weight, bias = _linear_map(self.heads, temperature=self.kernel_temperature)
        gates, kernel = zip(*(part.split([sum(self.sizes[:3]), self.sizes[3]]) for part in (weight, bias)))
        return FoldedAttention(
            _linear_map(self.squeeze, norm=self.bn), gates, kernel if self.num_kernels > 1 else None,
            gate_sizes=self.sizes[:3])

    def forward(self, x: Tensor) -> Attention:
        hidden = self.bn(self.squeeze(x.mean((2, 3)))).relu()
        logits = _at_least_float32(self.heads(hidden)) / _at_least_float32(self.kernel_temperature)
        taps_at = self.in_channels + self.out_channels
        kernels_at = taps_at + self.num_taps
        gates = torch.sigmoid(logits[:, :kernels_at])
        kernel_attn: Tensor | None = None
        if self.num_kernels > 1:
            kernel_attn = F.softmax(logits[:, kernels_at:], dim=1)
        out_attn: Tensor | None = None
        if self.out_channels > 0:
            out_attn = gates[:, self.in_channels:taps_at]
        tap_attn: Tensor | None = None
        if self.num_taps > 0:
            tap_attn = gates[:, taps_at:]
        return kernel_attn, gates[:, :self.in_channels], out_attn, tap_attn

    def extra_repr(self) -> str:
        return f'num_kernels={self.num_kernels}'


class FMDAttention(DynamicAttention):
    """Attention of FMDConv (arXiv 2503.17530) over the input channels, the K kernels and the output channels.

    For the pooled input g (B, C_in), with R and V1 the two parts of `squeeze`, A and F those of `gates`:

        h = relu(BN(R g)),  in_attn = sigmoid((A h + a) / gate_temperature),
        out_attn = sigmoid((F h + f) / gate_temperature),
        kernel_attn = softmax((V2 relu(V1 g) + v) / kernel_temperature)

    Both temperatures are buffers of shape (1,), saved with the weights; `set_temperature` changes them.

    Args:
        in_channels: C_in.
        out_channels: C_out; None where out_attn is not wanted (depthwise convolutions: it would equal in_attn).
        kernel_size: Not used.
        num_kernels: K. One kernel has no kernel attention and no parameters for it.
        reduction: h is max(int(C_in * reduction), 16) wide, as in the authors' code.
        kernel_ratio: V1 g is int(C_in * kernel_ratio) + 1 wide (K wide for images, C_in = 3), as in the authors' code.
    """
    kernel_temperature: Tensor
    gate_temperature: Tensor

    def __init__(
            self,
            in_channels: int,
            out_channels: int | None,
            kernel_size: tuple[int, int],
            num_kernels: int = 4,
            reduction: float = 1 / 16,
            kernel_ratio: float = 1 / 4,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        _check_ratios(reduction=reduction, kernel_ratio=kernel_ratio)
        self.in_channels = in_channels
        self.out_channels = out_channels or 0
        self.num_kernels = num_kernels
        self.gate_hidden = max(int(in_channels * reduction), 16)
        self.kernel_hidden = 0
        self.last_layers = ('gates', 'kernel') if num_kernels > 1 else ('gates',)
        if num_kernels > 1:
            self.kernel_hidden = num_kernels if in_channels == 3 else int(in_channels * kernel_ratio) + 1

        # nn.Linear, not nn.Conv2d: timm's init_weights re-initialises every nn.Conv2d it finds
        self.squeeze = nn.Linear(in_channels, self.gate_hidden + self.kernel_hidden, bias=False, **dd)
        self.bn = PooledBatchNorm(self.gate_hidden, **dd)
        self.gates = nn.Linear(self.gate_hidden, in_channels + self.out_channels, **dd)
        self.kernel = nn.Linear(self.kernel_hidden, num_kernels, **dd) if num_kernels > 1 else nn.Identity()
        self.register_buffer('kernel_temperature', torch.ones(1, **dd))
        self.register_buffer('gate_temperature', torch.ones(1, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the authors do: Kaiming normal with each part's own fan-out, zero biases, temperatures 1."""
        parts = [
            *self.squeeze.weight.split([self.gate_hidden, self.kernel_hidden]),
            *self.gates.weight.split([self.in_channels, self.out_channels]),
        ]
        biases = [self.gates.bias]
        if self.num_kernels > 1:
            parts.append(self.kernel.weight)
            biases.append(self.kernel.bias)
        for part in parts:
            if part.numel() > 0:
                nn.init.kaiming_normal_(part, mode='fan_out', nonlinearity='relu')
        for bias in biases:
            nn.init.zeros_(bias)
        self.bn.reset_parameters()
        nn.init.ones_(self.kernel_temperature)
        nn.init.ones_(self.gate_temperature)

    def fold(self) -> 'FoldedAttention':
        return FoldedAttention(
            _linear_map(self.squeeze, norm=self.bn),
            _linear_map(self.gates, temperature=self.gate_temperature),
            _linear_map(self.kernel, temperature=self.kernel_temperature) if self.num_kernels > 1 else None,
            gate_sizes=[self.in_channels, self.out_channels, 0],
            hidden_sizes=[self.gate_hidden, self.kernel_hidden],
        )

    def forward(self, x: Tensor) -> Attention:
        squeezed = self.squeeze(x.mean((2, 3)))  # (B, gate_hidden + kernel_hidden)
        hidden = self.bn(squeezed[:, :self.gate_hidden]).relu()
        gates = torch.sigmoid(_at_least_float32(self.gates(hidden)) / _at_least_float32(self.gate_temperature))
        out_attn: Tensor | None = None
        if self.out_channels > 0:
            out_attn = gates[:, self.in_channels:]
        kernel_attn: Tensor | None = None
        if self.num_kernels > 1:
            logits = self.kernel(squeezed[:, self.gate_hidden:].relu())
            kernel_attn = F.softmax(_at_least_float32(logits) / _at_least_float32(self.kernel_temperature), dim=1)
        return kernel_attn, gates[:, :self.in_channels], out_attn, None

    def extra_repr(self) -> str:
        return f'num_kernels={self.num_kernels}'


class FoldedAttention(nn.Module):
    """Any of these attentions for inference, its BatchNorm and temperatures folded into linear maps.

    After large kernels have gone through the caches every operation costs some 20 us, so there are few.

    Args:
        squeeze: Weight (out, in) and bias in front of the ReLU; None where the method has neither.
        gates: The same in front of the sigmoids, None without gates.
        kernel: The same in front of the softmax over the kernels, None for one kernel.
        gate_sizes: How many of the gates are in_attn, out_attn and tap_attn.
        hidden_sizes: How much of what is squeezed goes into `gates` and how much into `kernel`; None is all into both.
        competes: Whether the kernels' shares come from a softmax, not from sigmoids.
    """

    def __init__(
            self,
            squeeze: tuple[Tensor, Tensor] | None,
            gates: tuple[Tensor, Tensor] | None,
            kernel: tuple[Tensor, Tensor] | None,
            gate_sizes: list[int] | None = None,
            hidden_sizes: list[int] | None = None,
            competes: bool = True,
    ):
        super().__init__()
        self.gate_sizes, self.hidden_sizes, self.competes = gate_sizes or [0, 0, 0], hidden_sizes, competes
        for name, linear_map in ('squeeze', squeeze), ('gates', gates), ('kernel', kernel):
            weight, bias = (None, None) if linear_map is None else linear_map
            self.register_parameter(f'{name}_weight', None if weight is None else nn.Parameter(weight))
            self.register_parameter(f'{name}_bias', None if bias is None else nn.Parameter(bias))

    def forward(self, x: Tensor) -> Attention:
        hidden = x.mean((2, 3))
        if self.squeeze_weight is not None:
            hidden = F.linear(hidden, self.squeeze_weight, self.squeeze_bias).relu_()
        of_gates = of_kernel = hidden
        if self.hidden_sizes is not None:
            of_gates, of_kernel = hidden.split(self.hidden_sizes, 1)
        kernel_attn, gates = None, (None, None, None)
        if self.kernel_weight is not None:
            logits = _at_least_float32(F.linear(of_kernel, self.kernel_weight, self.kernel_bias))
            kernel_attn = logits.softmax(1) if self.competes else logits.sigmoid_()
        if self.gates_weight is not None:
            logits = _at_least_float32(F.linear(of_gates, self.gates_weight, self.gates_bias))
            gates = logits.sigmoid_().split(self.gate_sizes, 1)
            gates = [gate if size else None for gate, size in zip(gates, self.gate_sizes)]
        return kernel_attn, *gates


def _linear_map(
        linear: nn.Linear, norm: nn.BatchNorm1d | None = None, temperature: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Weight and bias, with the BatchNorm behind the first rows or the temperature that divides the result."""
    weight = linear.weight.detach().clone()
    bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.detach().clone()
    if norm is not None:
        scale, shift = norm_as_affine(norm)
        weight[:norm.num_features] *= scale[:, None]
        bias[:norm.num_features] = shift
    if temperature is not None:
        weight, bias = weight / temperature, bias / temperature
    return weight, bias


def norm_as_affine(norm: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor, Tensor]:
    """Scale and shift of each channel by a BatchNorm in evaluation mode."""
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach()
    shift = -norm.running_mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach()


def set_temperature(model: nn.Module, kernel: float | None = None, gate: float | None = None) -> None:
    """Set the temperatures of every dynamic convolution in `model`, in place.

    High temperatures make the attention uniform, so that all kernels learn; 1 is what training ends at.

    A method without such a temperature is left as it is: CondConv has none, DyConv none of gates. ODConv has a single
    one, which `kernel` sets: it divides the logits of all four attentions, as in its authors' code.

    Args:
        model: A network, a layer or a wrapper of one (DDP, EMA).
        kernel: Temperature of the softmax over the kernels (of the sigmoids too in ODConv); None leaves it.
        gate: Temperature of FMDConv's sigmoids over the channels; None leaves it.

    Raises:
        ValueError: A temperature is not positive and finite, or `model` has no dynamic convolution.
    """
    for name, value in ('kernel', kernel), ('gate', gate):
        if value is not None and not 0 < value < float('inf'):
            raise ValueError(f'{name} temperature must be positive and finite, got {value}')
    attentions = [module for module in model.modules() if isinstance(module, DynamicAttention)]
    if not attentions:
        raise ValueError(f'{type(model).__name__} has no dynamic convolution to set a temperature of')
    for attention in attentions:
        buffers = dict(attention.named_buffers(recurse=False))
        for name, value in ('kernel_temperature', kernel), ('gate_temperature', gate):
            if value is not None and name in buffers:
                buffers[name].fill_(value)
