"""Small convolutional networks, and one transformer: what tests, benchmarks and demos prune.

Every constructor draws the weights from a generator of its own: the same seed gives the same weights, and no global random state is
read or changed. Inputs are (B, in_channels, image_size, image_size) float32, outputs (B, classes) logits. Networks are returned in
float32, on the CPU, in eval mode, and torch.fx traces them all; in the transformer, attention stays one opaque node of the graph.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from nettrim.status import InvalidInput

Shortcut = Literal["A", "B"]

_M = TypeVar("_M", bound=nn.Module)


def lenet5(*, in_channels: int = 1, classes: int = 10, width: int = 20, image_size: int = 28, seed: int = 0) -> nn.Sequential:
    """LeNet-5 in Caffe's version with ReLUs: conv5x5x20, pool, conv5x5x50, pool, 500 units, classes.

    ``width`` scales all three (20 is Caffe's): width, 5 width / 2 and 25 width units. No padding, so images need at least 16 x 16
    pixels. The published network (LeCun, Bottou, Bengio and Haffner, 1998) is narrower and saturating; Caffe's has one ReLU, after
    the first fully connected layer, and this one a ReLU after each convolution too.

    Raises InvalidInput for sizes that make no network.
    """
    _check("lenet5", image_size, 16, in_channels=in_channels, classes=classes, width=width)
    second, units = math.ceil(2.5 * width), 25 * width
    side = ((image_size - 4) // 2 - 4) // 2

    def build() -> nn.Sequential:
        return _sequence(
            conv1=nn.Conv2d(in_channels, width, 5),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(width, second, 5),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(second * side * side, units),
            relu3=nn.ReLU(),
            fc2=nn.Linear(units, classes),
        )

    return _initialised(build, seed)


def vgg_like(
    *, in_channels: int = 1, classes: int = 10, width: int = 16, image_size: int = 28, dropout: float = 0.5, seed: int = 0
) -> nn.Sequential:
    """Three stages of two conv3x3-BN-ReLU blocks and a 2 x 2 max-pool; then a hidden layer, dropout and the classifier.

    The stages have width, 2 width and 4 width channels, the hidden layer 4 width units. Images need at least 8 x 8 pixels. After
    Simonyan and Zisserman (ICLR 2015), with batch-norm.

    Raises InvalidInput for sizes that make no network and dropout outside [0, 1).
    """
    _check("vgg_like", image_size, 8, in_channels=in_channels, classes=classes, width=width)
    if not 0 <= dropout < 1:
        raise InvalidInput(f"vgg_like: dropout must be at least 0 and below 1, found {dropout}; 0 turns it off")
    side = image_size // 8

    def build() -> nn.Sequential:
        modules: OrderedDict[str, nn.Module] = OrderedDict()
        before = in_channels
        for stage, channels in enumerate((width, 2 * width, 4 * width), start=1):
            for block in (1, 2):
                name = f"{stage}_{block}"
                modules[f"conv{name}"] = nn.Conv2d(before, channels, 3, padding=1, bias=False)
                modules[f"bn{name}"] = nn.BatchNorm2d(channels)
                modules[f"relu{name}"] = nn.ReLU()
                before = channels
            modules[f"pool{stage}"] = nn.MaxPool2d(2)
        modules["flatten"] = nn.Flatten()
        modules["fc1"] = nn.Linear(before * side * side, 4 * width)
        modules["relu_fc1"] = nn.ReLU()
        modules["dropout"] = nn.Dropout(dropout)
        modules["fc2"] = nn.Linear(4 * width, classes)
        return nn.Sequential(modules)

    return _initialised(build, seed)


def resnet(
    *,
    in_channels: int = 1,
    classes: int = 10,
    width: int = 16,
    blocks: int = 3,
    shortcut: Shortcut = "B",
    stem_stride: int = 1,
    image_size: int = 28,
    seed: int = 0,
) -> ResNet:
    """A residual network of 6 ``blocks`` + 2 layers with width, 2 width and 4 width channels (He, Zhang, Ren and Sun, CVPR 2016).

    ``shortcut`` says what a block that changes shape adds: "A", its input, strided and padded with zero channels, without parameters;
    "B", a 1 x 1 convolution of it with batch-norm (not counted among the layers). ``stem_stride`` 2 makes the first stage work at half the
    resolution: a quarter of the work. Any image with at least 4 x 4 pixels will do.

    Raises InvalidInput for sizes that make no network, an unknown shortcut and another stride than 1 and 2.
    """
    _check("resnet", image_size, 4, in_channels=in_channels, classes=classes, width=width, blocks=blocks)
    if shortcut not in ("A", "B"):
        raise InvalidInput(f"resnet: shortcut must be 'A' (slicing and zero channels) or 'B' (1x1 convolution), found {shortcut!r}")
    if stem_stride not in (1, 2):
        raise InvalidInput(f"resnet: stem_stride must be 1 (full resolution) or 2 (half), found {stem_stride!r}")
    return _initialised(lambda: ResNet(in_channels, classes, width, blocks, shortcut, stem_stride), seed)


def depthwise_separable(
    *, in_channels: int = 1, classes: int = 10, width: int = 16, stem_stride: int = 1, image_size: int = 28, seed: int = 0
) -> nn.Sequential:
    """A stem and six depthwise-separable blocks, in the manner of MobileNet (Howard and others, 2017).

    A block is a 3 x 3 convolution of each channel by itself (groups = channels), then a 1 x 1 convolution across channels, each with
    batch-norm and ReLU6. The blocks end in 2, 4, 4, 8, 8 and 8 times ``width`` channels; the second and the fourth halve the
    resolution, and so does the stem with ``stem_stride`` 2. Any image with at least 4 x 4 pixels will do.

    Raises InvalidInput for sizes that make no network and another stride than 1 and 2.
    """
    _check("depthwise_separable", image_size, 4, in_channels=in_channels, classes=classes, width=width)
    if stem_stride not in (1, 2):
        raise InvalidInput(f"depthwise_separable: stem_stride must be 1 (full resolution) or 2 (half), found {stem_stride!r}")

    def build() -> nn.Sequential:
        modules: OrderedDict[str, nn.Module] = OrderedDict()

        def convolution(name: str, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
            modules[name] = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
            modules[f"{name}_bn"] = nn.BatchNorm2d(outputs)
            modules[f"{name}_relu"] = nn.ReLU6()

        convolution("stem", in_channels, width, 3, stem_stride)
        before = width
        for index, (factor, stride) in enumerate(((2, 1), (4, 2), (4, 1), (8, 2), (8, 1), (8, 1)), start=1):
            convolution(f"depthwise{index}", before, before, 3, stride, groups=before)
            convolution(f"pointwise{index}", before, factor * width, 1)
            before = factor * width
        modules["pool"] = nn.AdaptiveAvgPool2d(1)
        modules["flatten"] = nn.Flatten()
        modules["fc"] = nn.Linear(before, classes)
        return nn.Sequential(modules)

    return _initialised(build, seed)


def transformer_encoder(
    *,
    in_channels: int = 1,
    classes: int = 10,
    width: int = 64,
    heads: int = 4,
    layers: int = 2,
    patch: int = 4,
    activation: Literal["relu", "gelu"] = "gelu",
    image_size: int = 28,
    seed: int = 0,
) -> TransformerEncoder:
    """A small vision transformer: ``patch`` x ``patch`` pixels make a token, the mean of all tokens is classified.

    Each of the ``layers`` is, with layer-norm first and a residual sum after, multi-head attention of ``width`` units and
    a hidden layer of 2 ``width`` units (Dosovitskiy and others, ICLR 2021, without the class token). torch.fx traces it with each
    `torch.nn.MultiheadAttention` as one node, so the graph does not show the projections inside.

    Raises InvalidInput for sizes that make no network, patches that do not tile the image and heads that do not divide the width.
    """
    _check(
        "transformer_encoder", image_size, 1, in_channels=in_channels, classes=classes, width=width, heads=heads, layers=layers, patch=patch
    )
    if image_size % patch:
        raise InvalidInput(f"transformer_encoder: patch must divide image_size, found {patch} and {image_size}; choose another patch")
    if width % heads:
        raise InvalidInput(f"transformer_encoder: heads must divide width, found {heads} and {width}; choose another width")
    if activation not in ("relu", "gelu"):
        raise InvalidInput(f"transformer_encoder: activation must be 'relu' or 'gelu', found {activation!r}")
    tokens = (image_size // patch) ** 2
    return _initialised(lambda: TransformerEncoder(in_channels, classes, width, heads, layers, patch, activation, tokens), seed)


class SlicedShortcut(nn.Module):
    """Option A of He and others (2016): every ``stride``-th pixel, and zero channels before and after, the odd one after.

    Maps (B, inputs, H, W) to (B, outputs, ceil(H / stride), ceil(W / stride)); no parameters.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = (outputs - inputs) // 2
        self.after = outputs - inputs - self.before

    def forward(self, images: Tensor) -> Tensor:
        kept = images[:, :, :: self.stride, :: self.stride]
        return functional.pad(kept, (0, 0, 0, 0, self.before, self.after))


class ResidualBlock(nn.Module):
    """conv3x3-BN-ReLU-conv3x3-BN, plus the shortcut, then ReLU: (B, inputs, H, W) to (B, outputs, H / stride, W / stride), rounded up."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if (inputs, stride) != (outputs, 1):
            self.shortcut = (
                SlicedShortcut(inputs, outputs, stride)
                if shortcut == "A"
                else _sequence(conv=nn.Conv2d(inputs, outputs, 1, stride, bias=False), bn=nn.BatchNorm2d(outputs))
            )
        self.relu2 = nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        inner = self.relu1(self.bn1(self.conv1(images)))
        outer: Tensor = self.relu2(self.bn2(self.conv2(inner)) + self.shortcut(images))
        return outer


class ResNet(nn.Module):
    """See `resnet`, which makes it with the weights of a seed."""

    def __init__(self, in_channels: int, classes: int, width: int, blocks: int, shortcut: Shortcut, stem_stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width, 3, stem_stride, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        stages = []
        before = width
        for stage, channels in enumerate((width, 2 * width, 4 * width)):
            modules = []
            for block in range(blocks):
                modules.append(ResidualBlock(before, channels, 2 if stage and not block else 1, shortcut))
                before = channels
            stages.append(nn.Sequential(*modules))
        self.stage1, self.stage2, self.stage3 = stages
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(before, classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stage3(self.stage2(self.stage1(self.relu(self.bn(self.conv(images))))))
        logits: Tensor = self.fc(self.flatten(self.pool(features)))
        return logits


class EncoderLayer(nn.Module):
    """Layer-norm, self-attention, sum; layer-norm, Linear, activation, Linear, sum: (B, tokens, width) to the same shape."""

    def __init__(self, width: int, heads: int, activation: str) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.activation: nn.Module = nn.GELU() if activation == "gelu" else nn.ReLU()
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        normed = self.norm1(tokens)
        tokens = tokens + self.attention(normed, normed, normed, need_weights=False)[0]
        tokens = tokens + self.fc2(self.activation(self.fc1(self.norm2(tokens))))
        return tokens


class TransformerEncoder(nn.Module):
    """See `transformer_encoder`, which makes it with the weights of a seed."""

    def __init__(
        self, in_channels: int, classes: int, width: int, heads: int, layers: int, patch: int, activation: str, tokens: int
    ) -> None:
        super().__init__()
        self.embed = nn.Conv2d(in_channels, width, patch, stride=patch)
        self.flatten = nn.Flatten(2)
        self.position = nn.Parameter(torch.empty(1, tokens, width))
        self.layers = nn.Sequential(*(EncoderLayer(width, heads, activation) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.flatten(self.embed(images)).transpose(1, 2) + self.position
        logits: Tensor = self.fc(self.norm(self.layers(tokens)).mean(dim=1))
        return logits


@dataclass(frozen=True)
class Entry:
    """A named network: its constructor, and the arguments that differ from the constructor's own."""

    constructor: Callable[..., nn.Module]
    arguments: Mapping[str, Any]

    def make(self, *, in_channels: int, classes: int, image_size: int, seed: int) -> nn.Module:
        """The network for such images, with the weights of ``seed``."""
        return self.constructor(in_channels=in_channels, classes=classes, image_size=image_size, seed=seed, **self.arguments)


# Arguments that change the weights are written out, although some are defaults: cached networks state them.
NETWORKS: Mapping[str, Entry] = MappingProxyType(
    {
        "lenet5": Entry(lenet5, {"width": 20}),
        "vgg_like": Entry(vgg_like, {"width": 16, "dropout": 0.5}),
        "resnet20_a": Entry(resnet, {"width": 16, "blocks": 3, "shortcut": "A", "stem_stride": 2}),
        "resnet20_b": Entry(resnet, {"width": 16, "blocks": 3, "shortcut": "B", "stem_stride": 2}),
        "depthwise_separable": Entry(depthwise_separable, {"width": 16, "stem_stride": 2}),
        "transformer_encoder": Entry(transformer_encoder, {"width": 64, "heads": 4, "layers": 2, "patch": 4, "activation": "gelu"}),
    }
)
"""The networks that `zoo_training.trained` trains, by name."""


def _sequence(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


def _check(network: str, image_size: int, smallest: int, **counts: int) -> None:
    if image_size < smallest:
        raise InvalidInput(
            f"{network}: images must have at least {smallest} x {smallest} pixels, found image_size {image_size}; enlarge them first"
        )
    for name, count in counts.items():
        if count < 1:
            raise InvalidInput(f"{network}: {name} must be at least 1, found {count}; pass a positive number")


def _initialised(build: Callable[[], _M], seed: int) -> _M:
    """Build without values, as the modules' own initialisation would advance the global generator; then draw from one of its own."""
    with torch.device("meta"):
        model = build()
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            _initialise(module, generator)
    return model.eval()


def _initialise(module: nn.Module, generator: torch.Generator) -> None:
    """The module's own parameters and buffers: He's normal for convolutions, the usual uniform for Linear, Glorot's for attention."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        bound = 1 / math.sqrt(module.in_features)
        nn.init.uniform_(module.weight, -bound, bound, generator=generator)
        nn.init.uniform_(module.bias, -bound, bound, generator=generator)
    elif isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
        module.reset_parameters()  # ones and zeros: nothing is drawn
    elif isinstance(module, nn.MultiheadAttention):
        assert module.in_proj_weight is not None and module.in_proj_bias is not None  # one width for queries, keys and values
        nn.init.xavier_uniform_(module.in_proj_weight, generator=generator)
        nn.init.zeros_(module.in_proj_bias)
    elif isinstance(module, TransformerEncoder):
        nn.init.trunc_normal_(module.position, std=0.02, generator=generator)
    elif next(module.parameters(recurse=False), None) is not None:
        raise AssertionError(f"{type(module).__name__} has parameters and no initial values are defined for it")
