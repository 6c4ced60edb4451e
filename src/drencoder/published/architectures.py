"""The auto-encoder's networks: a closed table, so that no string of a recipe ever becomes an import.

Legend: N updates, D adapter values, L padded length, H x W image, c channels.

Input layout of all of them: the flat update in the layout's order (modules in natural order, LoRA's A before its B,
each tensor row by row), padded with zeros at the end. The ResNet and the U-shaped network read it row by row as one
image [1, H, W] of multiples of 64, the 1-D CNN as one signal [1, L], a multiple of 256. LLaMA-7B with r = 8 on q, k, v, o is
[1, 4096, 2048] without padding, and every LoRA tensor of it fills 16 whole image rows.

Sources: CG-FedLLM (Wu et al., arXiv 2405.13746, appendix) and DR-Encoder (Wu et al., AAAI-25, arXiv 2412.17053)
describe the ResNet; of the 1-D CNN they give the rate and of the U-shaped network the name. What is not stated there
and chosen here: zero padding (reflection does not work for a code grid of one cell), the initialisation
(`fresh_network`), and all of these two but their rates.
"""

from collections.abc import Callable, Mapping
from itertools import pairwise
from types import MappingProxyType
from typing import final

import torch
from torch import Tensor, nn

from drencoder.encoders.code_sizes import code_shape

_STAGES = (1, 2, 4, 8, 16, 32, 64)  # ResNet: channels of the stem and after each stride-2 stage
_BLOCKS = 3
_WAVES = (1, 8, 16, 32)  # 1-D CNN: channels before the code
_STRIDE = 4  # of each of its stages; four of them
_LEVELS = (4, 8, 16, 32, 64, 64, 64)  # U-shaped network: channels at full resolution, after 1 pooling, ... 6
_FIRST_ANSWER = 0.1  # gain of the last convolution at the start, see `fresh_network`
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d)


@final
class AutoencoderNetwork(nn.Module):
    """Two halves: `encoder` [N, *input] -> [N, *code] and `decoder` back; only the code crosses the wire."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, input_N1x: Tensor) -> Tensor:
        reconstruction: Tensor = self.decoder(self.encoder(input_N1x))
        return reconstruction


class _Residual(nn.Module):
    """x + BN(conv(ReLU(BN(conv(x))))) at the code's resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(*_conv(channels, channels), nn.Conv2d(channels, channels, 3, padding=1, bias=False))
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x_NcHW: Tensor) -> Tensor:
        return x_NcHW + self.norm(self.inner(x_NcHW))


def _conv(few: int, many: int, stride: int = 1) -> tuple[nn.Module, ...]:
    return nn.Conv2d(few, many, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(many), nn.ReLU()


def _resnet() -> AutoencoderNetwork:
    """[N, 1, H, W] -> [N, 64, H/64, W/64]: 3 x 3 stem, six stride-2 stages, three residual blocks; the mirror image
    back, a 7 x 7 convolution, Tanh. BatchNorm and ReLU after every convolution."""
    top = _STAGES[-1]
    down = [*_conv(1, _STAGES[0])]
    for few, many in pairwise(_STAGES):
        down += _conv(few, many, stride=2)
    down += [_Residual(top) for _ in range(_BLOCKS)]
    up: list[nn.Module] = [_Residual(top) for _ in range(_BLOCKS)]
    for few, many in reversed(list(pairwise(_STAGES))):
        wider = nn.ConvTranspose2d(many, few, 3, stride=2, padding=1, output_padding=1, bias=False)
        up += [wider, nn.BatchNorm2d(few), nn.ReLU()]
    up += [nn.Conv2d(_STAGES[0], 1, 7, padding=3), nn.Tanh()]
    return AutoencoderNetwork(nn.Sequential(*down), nn.Sequential(*up))


def _cnn1d() -> AutoencoderNetwork:
    """[N, 1, L] -> [N, 8, L/256]: four stages of stride 4, the code without BatchNorm and ReLU so that it has both signs; the
    mirror image back, Tanh. The published sources give the rate 1/32 only."""
    many = code_shape("autoencoder-cnn1d", 1)[0]
    down: list[nn.Module] = []
    up: list[nn.Module] = []
    for few, wide in pairwise(_WAVES):
        down += [nn.Conv1d(few, wide, 9, stride=_STRIDE, padding=4, bias=False), nn.BatchNorm1d(wide), nn.ReLU()]
    down.append(nn.Conv1d(_WAVES[-1], many, 9, stride=_STRIDE, padding=4))
    for few, wide in reversed(list(pairwise((*_WAVES[1:], many)))):
        up += [nn.ConvTranspose1d(wide, few, 8, stride=_STRIDE, padding=2, bias=False), nn.BatchNorm1d(few), nn.ReLU()]
    up += [nn.ConvTranspose1d(_WAVES[1], 1, 8, stride=_STRIDE, padding=2), nn.Tanh()]
    return AutoencoderNetwork(nn.Sequential(*down), nn.Sequential(*up))


@final
class _CodeSkips(nn.Module):
    """The expanding path of `_unet`, with skips made from the code."""

    def __init__(self) -> None:
        super().__init__()
        top = _LEVELS[-1]
        self.first = nn.Sequential(*_conv(top, top))
        self.up, self.skip, self.merge = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for many, few in pairwise(reversed(_LEVELS)):
            self.up.append(nn.ConvTranspose2d(many, few, 2, stride=2))
            self.skip.append(nn.Conv2d(top, few, 1))
            self.merge.append(nn.Sequential(*_conv(2 * few, few), *_conv(few, few)))
        self.last = nn.Sequential(nn.Conv2d(_LEVELS[0], 1, 1), nn.Tanh())

    def forward(self, code_NcHW: Tensor) -> Tensor:
        x_NcHW = self.first(code_NcHW)
        for up, skip, merge in zip(self.up, self.skip, self.merge, strict=True):
            x_NcHW = up(x_NcHW)
            # A 1 x 1 convolution and nearest-neighbour enlarging commute; this order is 4^level times cheaper.
            side_NcHW = nn.functional.interpolate(skip(code_NcHW), size=x_NcHW.shape[2:], mode="nearest")
            x_NcHW = merge(torch.cat((side_NcHW, x_NcHW), dim=1))
        image: Tensor = self.last(x_NcHW)
        return image


def _unet() -> AutoencoderNetwork:
    """[N, 1, H, W] -> [N, 64, H/64, W/64]: two 3 x 3 convolutions per level and 2 x 2 max pooling down, 2 x 2
    up-convolutions back (Ronneberger et al. 2015, https://arxiv.org/abs/1505.04597), BatchNorm added.

    A U-Net's skip connections would carry full-resolution features of the contracting path past the bottleneck: more
    values than the update itself, so nothing would be compressed. Here only the bottleneck crosses the wire, and each
    level of the expanding path is joined with features that the decoder computes from the code alone: a 1 x 1
    convolution of it, enlarged to the level's resolution. This is our reading; the paper only names the variant.
    """
    down = [*_conv(1, _LEVELS[0]), *_conv(_LEVELS[0], _LEVELS[0])]
    for few, many in pairwise(_LEVELS):
        down += [nn.MaxPool2d(2), *_conv(few, many), *_conv(many, many)]
    down.append(nn.Conv2d(_LEVELS[-1], code_shape("autoencoder-unet", 1)[0], 1))  # a code of both signs
    return AutoencoderNetwork(nn.Sequential(*down), _CodeSkips())


ARCHITECTURES: Mapping[str, tuple[Callable[[], AutoencoderNetwork], int]] = MappingProxyType(
    {
        "autoencoder": (_resnet, 20),
        "autoencoder-published": (_resnet, 20),
        "autoencoder-cnn1d": (_cnn1d, 8),
        "autoencoder-unet": (_unet, 28),
    }
)
"""Name -> how the network is made, and the peak working memory of one encode in float32 values per padded value (measured,
rounded up). What it reads, and what its code looks like: `code_sizes.input_shape` and `code_shape`."""


def blank_network(name: str) -> AutoencoderNetwork:
    """A network on the CPU with unset weights, made without drawing from the global generator."""
    with torch.device("meta"):
        network = ARCHITECTURES[name][0]()
    return network.to_empty(device="cpu")


def fresh_network(name: str, generator: torch.Generator) -> AutoencoderNetwork:
    """An untrained network; the same for the same state of `generator`.

    Kaiming's normal for the convolutions (He et al. 2015, https://arxiv.org/abs/1502.01852), except that the last one starts
    ten times smaller and that residual blocks start as the identity (Goyal et al. 2017, https://arxiv.org/abs/1706.02677,
    5.1). The published sources state no initialisation. With Kaiming's alone the first answer is noise as large as
    Tanh's range, many times the gradients, and unlearning it took longer than the whole training for many seeds.
    """
    network = blank_network(name)
    last = None
    for module in network.modules():
        if isinstance(module, _CONVOLUTIONS):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            last = module
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.reset_parameters()  # constants
    for module in network.modules():
        if isinstance(module, _Residual):
            nn.init.zeros_(module.norm.weight)
    assert last is not None
    with torch.no_grad():
        last.weight.mul_(_FIRST_ANSWER)
    return network
