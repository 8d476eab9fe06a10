"""Spiking networks of TrLIF layers, as plain modules. They return logits per time step.

    model = build("resnet19", num_classes=100, timesteps=2)
    logits = model(images)        # [B, C, H, W], or event frames [B, T, C, H, W] -> [T, B, classes]
    prediction = logits.mean(0).argmax(1)

Inside a network a tensor is [T*B, C, H, W], time steps folded into the batch: convolutions,
BatchNorm and pooling know nothing of time. Only the neurons do; `fire` unfolds T for them.
Between calls a network holds no state but its weights and running means.

    resnet19                     CIFAR's: 3x3 stem, stages of 128 x3, 256 x3, 512 x2 channels
    resnet18, resnet34           ImageNet's: 7x7 stem and max-pooling, stages of 64 to 512
    sew_resnet18, sew_resnet34   the same, each block firing before its shortcut is added
                                 (Fang et al. 2021, "ADD")
    spikformer                   Spikformer-4-384 (Zhou et al. 2023): convolutional patches,
                                 spiking self attention

In a resnet only spikes travel between layers, each 0 or theta (the head reads their means over
places). In sew_resnet* and spikformer the residual streams add the spikes of several layers, each
with its own theta. `fold` makes a copy for inference in which every spike is 0 or 1.

This file imports neuron.py.
"""
import copy
import math

import torch
import torch.nn as nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from neuron import TrLIF, compile_options

# The stages of each resnet: (channels for a stem of 64, blocks, stride of the first block).
RESNETS = {
    "resnet19": [(128, 3, 1), (256, 3, 2), (512, 2, 2)],
    "resnet18": [(64, 2, 1), (128, 2, 2), (256, 2, 2), (512, 2, 2)],
    "resnet34": [(64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)],
}
RESNETS["sew_resnet18"] = RESNETS["resnet18"]
RESNETS["sew_resnet34"] = RESNETS["resnet34"]
ARCHS = (*RESNETS, "spikformer")
INITS = "published", "kaiming", "identity"


# ---- Parts --------------------------------------------------------------------------------------

def conv_bn(c_in, c_out, kernel, stride=1):
    """Convolution and BatchNorm: a layer's input current from the spikes that arrive."""
    # No bias, because BatchNorm has one.
    convolution = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(c_out))


def fire(neuron, x, T):
    """Run a neuron layer, which takes [T, B, ...], on a current [T*B, ...]: spikes [T*B, ...]."""
    return neuron(x.unflatten(0, (T, -1))).flatten(0, 1)


def input_current(stem, x, timesteps):
    """The stem's current [T, B, C, H, W] for images [B, C, H, W] or frames [B, T, C, H, W]."""
    if x.dim() == 4:
        # An image is the same at all steps. Its current is computed once; expand copies nothing.
        return stem(x).expand(timesteps, -1, -1, -1, -1)
    # [B, T, C, H, W] -> [T*B, C, H, W] -> [T, B, C, H, W].
    return stem(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (x.shape[1], -1))


class Add(nn.Module):
    """Adds the spikes y of a layer to a residual stream x. A module, so that `fold` can replace
    it."""

    def forward(self, x, y):
        return x + y


# ---- Residual networks --------------------------------------------------------------------------

class Block(nn.Module):
    """conv-BN-LIF-conv-BN, plus the shortcut, LIF."""

    def __init__(self, c_in, c_out, stride, lif_options):
        super().__init__()
        self.conv1, self.lif1 = conv_bn(c_in, c_out, 3, stride), TrLIF(**lif_options)
        self.conv2, self.lif2 = conv_bn(c_out, c_out, 3), TrLIF(**lif_options)
        # A 1x1 convolution adapts the shape where it changes.
        same_shape = stride == 1 and c_in == c_out
        self.shortcut = nn.Identity() if same_shape else conv_bn(c_in, c_out, 1, stride)

    def forward(self, x, T):
        y = fire(self.lif1, self.conv1(x), T)
        # The shortcut is added before the neurons, so each value that leaves is 0 or theta.
        return fire(self.lif2, self.conv2(y) + self.shortcut(x), T)


class SEWBlock(nn.Module):
    """conv-BN-LIF-conv-BN-LIF, plus the shortcut, which fires too where it is a convolution."""

    def __init__(self, c_in, c_out, stride, lif_options):
        super().__init__()
        self.conv1, self.lif1 = conv_bn(c_in, c_out, 3, stride), TrLIF(**lif_options)
        self.conv2, self.lif2 = conv_bn(c_out, c_out, 3), TrLIF(**lif_options)
        # Where the shape stays, the shortcut has no layer.
        self.shortcut, self.lif_shortcut = None, None
        if stride != 1 or c_in != c_out:
            self.shortcut, self.lif_shortcut = conv_bn(c_in, c_out, 1, stride), TrLIF(**lif_options)
        self.join = Add()

    def forward(self, x, T):
        y = fire(self.lif1, self.conv1(x), T)
        y = fire(self.lif2, self.conv2(y), T)
        if self.shortcut is not None:
            x = fire(self.lif_shortcut, self.shortcut(x), T)
        # The shortcut is added after the neurons, so the gradient has a way past them.
        return self.join(x, y)


class ResNet(nn.Module):
    """stages: (channels, blocks, stride) each. imagenet: 7x7 stem of stride 2 and max-pooling."""

    def __init__(self, block, stages, num_classes, timesteps, in_channels, width,
                 lif_options, imagenet=False):
        super().__init__()
        self.timesteps = timesteps
        # Images of 224 pixels are large: stem and pooling quarter their side.
        kernel, stride = (7, 2) if imagenet else (3, 1)
        self.stem = conv_bn(in_channels, width, kernel, stride)
        self.lif = TrLIF(**lif_options)
        self.pool = nn.MaxPool2d(3, 2, 1) if imagenet else nn.Identity()
        self.blocks = nn.ModuleList()
        c_in = width
        for c_out, blocks, stride in stages:
            for i in range(blocks):
                # Only the first block of a stage has its stride.
                self.blocks.append(block(c_in, c_out, stride if i == 0 else 1, lif_options))
                c_in = c_out
        self.head = nn.Linear(c_in, num_classes)

    def forward(self, x):
        x = input_current(self.stem, x, self.timesteps)
        T = x.shape[0]
        # From here on x is [T*B, C, H, W].
        x = self.pool(self.lif(x).flatten(0, 1))
        for block in self.blocks:
            x = block(x, T)
        # The head reads the mean over places and gives logits for each step.
        return self.head(x.mean((2, 3))).unflatten(0, (T, -1))


# ---- Spikformer ---------------------------------------------------------------------------------

class LinearLIF(nn.Module):
    """linear-BN-LIF on tokens: [T*B, N, C_in] -> [T*B, N, C_out]."""

    def __init__(self, c_in, c_out, lif_options):
        super().__init__()
        # With a bias, as in the published network.
        self.linear = nn.Sequential(nn.Linear(c_in, c_out), nn.BatchNorm1d(c_out))
        self.lif = TrLIF(**lif_options)

    def forward(self, x, T):
        # BatchNorm1d takes each token as a sample: [T*B, N, C] -> [T*B*N, C] and back.
        current = self.linear(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return fire(self.lif, current, T)


class SpikingSelfAttention(nn.Module):
    """Attention between spikes, without a softmax: LIF(q k^T v / 8). x [T*B, N tokens, D]."""

    def __init__(self, dim, heads, lif_options):
        super().__init__()
        self.heads = heads
        # Queries, keys, values and the output are spikes.
        self.q, self.k, self.v, self.out = (LinearLIF(dim, dim, lif_options) for _ in range(4))
        # The neurons that take the product have half the threshold, as published.
        half = 0.5 * lif_options.get("threshold", 1.0)
        self.lif = TrLIF(**{**lif_options, "threshold": half})

    def split_heads(self, spikes):
        """[T*B, N, D] -> [T*B, heads, N, D / heads]."""
        return spikes.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def forward(self, x, T):
        q, k, v = (self.split_heads(layer(x, T)) for layer in (self.q, self.k, self.v))
        # Without a softmax (q k^T) v = q (k^T v), which never forms the N x N matrix. The scale is
        # 1 / 8 as published, whatever the width of a head.
        y = q @ (k.transpose(2, 3) @ v) * 0.125
        return self.out(fire(self.lif, y.transpose(1, 2).flatten(2), T), T)


class SpikingMLP(nn.Module):
    """Two layers for each token, with four times the channels in between."""

    def __init__(self, dim, lif_options):
        super().__init__()
        self.up = LinearLIF(dim, 4 * dim, lif_options)
        self.down = LinearLIF(4 * dim, dim, lif_options)

    def forward(self, x, T):
        return self.down(self.up(x, T), T)


def tokens(x):
    """Each place becomes a token: [T*B, D, H, W] -> [T*B, H*W, D]."""
    return x.flatten(2).transpose(1, 2)


class Spikformer(nn.Module):
    """Patch splitting to tokens of 6 * width channels, then blocks of attention and MLP."""

    def __init__(self, num_classes, timesteps, in_channels, width, lif_options, depth=4,
                 heads=12):
        super().__init__()
        self.timesteps = timesteps
        # The channels double three times, from an eighth of a token's channels to all of them.
        dim = 6 * width
        channels = [in_channels, dim // 8, dim // 4, dim // 2, dim, dim]
        self.patches = nn.ModuleList(conv_bn(a, b, 3) for a, b in zip(channels, channels[1:]))
        self.lifs = nn.ModuleList(TrLIF(**lif_options) for _ in self.patches)
        # The third and fourth stage halve the side, so 32x32 pixels become 8x8 tokens.
        pools = [nn.Identity(), nn.Identity(), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(3, 2, 1)]
        self.pools = nn.ModuleList(pools)
        self.attention = nn.ModuleList(SpikingSelfAttention(dim, heads, lif_options)
                                       for _ in range(depth))
        self.mlp = nn.ModuleList(SpikingMLP(dim, lif_options) for _ in range(depth))
        self.join = Add()
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x):
        x = input_current(self.patches[0], x, self.timesteps)
        T = x.shape[0]
        x = self.pools[0](self.lifs[0](x).flatten(0, 1))
        for i in (1, 2, 3):
            x = self.pools[i](fire(self.lifs[i], self.patches[i](x), T))
        # The fifth convolution serves as position embedding, as published.
        x = self.join(tokens(x), tokens(fire(self.lifs[4], self.patches[4](x), T)))
        # The stream x is [T*B, N tokens, D]. Each block adds its spikes to it.
        for attention, mlp in zip(self.attention, self.mlp):
            x = self.join(x, attention(x, T))
            x = self.join(x, mlp(x, T))
        # The head reads the mean over tokens and gives logits for each step.
        return self.head(x.mean(1)).unflatten(0, (T, -1))


# ---- Building -----------------------------------------------------------------------------------

def build(arch, num_classes, timesteps, in_channels=3, width=64, init="published",
          **lif_options):
    """Build a network.

    arch            one of ARCHS
    timesteps       T for static images; event frames bring their own
    in_channels     3 for colour images, 2 for event frames
    width           the stem's channels in a resnet, a sixth of the embedding in spikformer (a
                    multiple of 4): 64 is the published network, 8 one for a small machine
    init            how weights are initialised. "published": as PyTorch does; in the ImageNet
                    resnets kaiming_normal (fan_out) and a head of normal(0, 0.01), as published.
                    "kaiming": kaiming_normal (fan_out) in every convolution. "identity": the same,
                    and see start_near_identity
    lif_options     handed to every TrLIF, see there

    forward: [B, C, H, W] or [B, T, C, H, W] -> logits [T, B, num_classes]. Raises ValueError for
    values that are out of range.
    """
    if arch not in ARCHS:
        raise ValueError(f"unknown arch {arch!r}: choose one of {', '.join(ARCHS)}")
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}, not {init!r}")
    if min(num_classes, timesteps, in_channels, width) < 1:
        raise ValueError(f"num_classes {num_classes}, timesteps {timesteps}, in_channels "
                         f"{in_channels} and width {width} must be at least 1")
    if arch == "spikformer" and width % 4:
        raise ValueError(f"spikformer's width must be a multiple of 4, not {width}: 12 heads "
                         "share 6 * width channels, the first convolution has an eighth")
    common = num_classes, timesteps, in_channels, width, lif_options
    imagenet = arch not in ("resnet19", "spikformer")
    if arch == "spikformer":
        model = Spikformer(*common)
    else:
        block = SEWBlock if arch.startswith("sew") else Block
        stages = [(channels * width // 64, *others) for channels, *others in RESNETS[arch]]
        model = ResNet(block, stages, *common, imagenet)
    # PyTorch has initialised all weights in its own way.
    if init != "published" or imagenet:
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if init == "published" and imagenet:
        nn.init.normal_(model.head.weight, 0, 0.01)
        nn.init.zeros_(model.head.bias)
    if init == "identity":
        start_near_identity(model)
    return model


@torch.no_grad()
def start_near_identity(model):
    """Let each Block with a plain shortcut begin by passing on the shortcut's spikes, in place.

    From the usual start few of these spikes get through a Block, and hardly anything of an image
    gets through a deep resnet. Here the BatchNorm of conv2 starts with a small current around the
    constant b = theta tau / 2. Without spikes on the shortcut the potential then tends to b, which
    is below theta. A spike of height theta takes it from 0 to (b + theta) / tau in one step, which
    is above theta. Both need tau < 2, and the second needs TrSG or theta = 1. ValueError for
    tau >= 2, and for a network without such blocks.
    """
    if not isinstance(model, ResNet) or not isinstance(model.blocks[0], Block):
        raise ValueError("init 'identity' is for resnet18, resnet19 and resnet34")
    for block in model.blocks:
        norm, theta, tau = block.conv2[1], block.lif2.initial_threshold, block.lif2.initial_tau
        if tau >= 2:
            raise ValueError(f"init 'identity' needs tau below 2, not {tau:g}: try 1.25")
        nn.init.constant_(norm.weight, 0.1)
        nn.init.constant_(norm.bias, theta * tau / 2)


@torch.no_grad()
def scale_currents(model, threshold):
    """Multiply every BatchNorm's weight, initially 1, by theta, in place (as threshold-dependent
    BatchNorm does, Zheng et al. 2021).

    Currents and thresholds then scale alike, so in training mode an untrained network of TrSG
    layers fires the same for every theta, up to BatchNorm's eps. Spikformer does not, because its
    attention multiplies three spikes.
    """
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)):
            module.weight *= threshold


def compile_model(model, **options):
    """Fuse the whole network with torch.compile, in place, and return it: BatchNorm, shortcuts
    and neurons share kernels. The first call takes minutes, in training and in evaluation."""
    # With dynamic=False each shape gets a kernel of its own, which is faster than a shared one.
    model.compile(dynamic=False, options=compile_options(), **options)
    return model


# ---- Folding: a network for inference whose spikes are all 1 -------------------------------------

class Concatenate(nn.Module):
    """Replaces Add in a folded network. Streams lie side by side along dim, and the next layer has
    weights for each."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def forward(self, x, y):
        return torch.cat([x, y], self.dim)


class Scale(nn.Module):
    """Replaces a plain shortcut in a folded network: one connection of weight theta per neuron."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x):
        return x * self.weight


def synapses(model):
    """[(layer, sources)] in the order of computation: which spikes reach which weights.

    layer    a convolution or linear layer with its BatchNorm (a Sequential), the head, or the
             Identity of a plain shortcut. In a folded network the layer that replaces it
    sources  the TrLIF layers whose spikes arrive there, added up; [] for the input
    """
    if isinstance(model, Spikformer):
        # Each layer that is added to the stream becomes one of its sources.
        found = [(model.patches[0], [])]
        found += [(model.patches[i], [model.lifs[i - 1]]) for i in range(1, 5)]
        stream = [model.lifs[3], model.lifs[4]]
        for attention, mlp in zip(model.attention, model.mlp):
            found += [(part.linear, stream) for part in (attention.q, attention.k, attention.v)]
            found += [(attention.out.linear, [attention.lif])]
            stream = stream + [attention.out.lif]
            found += [(mlp.up.linear, stream), (mlp.down.linear, [mlp.up.lif])]
            stream = stream + [mlp.down.lif]
        return found + [(model.head, stream)]
    found, stream = [(model.stem, [])], [model.lif]
    for block in model.blocks:
        if block.shortcut is not None:
            found.append((block.shortcut, stream))
        # conv1 reads the stream, conv2 the spikes of lif1.
        found += [(block.conv1, stream), (block.conv2, [block.lif1])]
        if isinstance(block, SEWBlock):
            # The block adds its spikes to what came over the shortcut.
            beside = stream if block.shortcut is None else [block.lif_shortcut]
            stream = beside + [block.lif2]
        else:
            stream = [block.lif2]
    return found + [(model.head, stream)]


def pooling(model):
    """[(neuron layer, the pooling through which its spikes leave)], for counting what arrives."""
    if isinstance(model, Spikformer):
        # No pooling follows the fifth neuron layer.
        return list(zip(model.lifs[:4], model.pools))
    return [(model.lif, model.pool)]


def spike_height(neuron):
    """The value of a spike, a 0-d tensor: theta, or 1 for neurons of the naive form."""
    threshold = neuron.threshold
    return threshold if neuron.surrogate == "trsg" else torch.ones_like(threshold)


def folded_layer(layer, sources):
    """The layer that takes spikes of 0 or 1, those of all sources side by side, and has BatchNorm
    in its weights."""
    if isinstance(layer, nn.Identity):
        return Scale(spike_height(sources[0]))
    linear, *norms = layer if isinstance(layer, nn.Sequential) else [layer]
    # W (theta_1 s_1 + theta_2 s_2) = [theta_1 W, theta_2 W] [s_1, s_2]. The input stays as it is.
    heights = [spike_height(neuron) for neuron in sources] or [1.0]
    weight, bias = torch.cat([linear.weight * height for height in heights], 1), linear.bias
    fuse = fuse_linear_bn_weights if isinstance(linear, nn.Linear) else fuse_conv_bn_weights
    # In evaluation BatchNorm multiplies and adds constants. The head has none.
    for norm in norms:
        weight, bias = fuse(weight, bias, norm.running_mean, norm.running_var, norm.eps,
                            norm.weight, norm.bias)
    if isinstance(linear, nn.Linear):
        new = nn.Linear(weight.shape[1], weight.shape[0])
    else:
        new = nn.Conv2d(weight.shape[1], weight.shape[0], linear.kernel_size, linear.stride,
                        linear.padding)
    new.weight, new.bias = nn.Parameter(weight), nn.Parameter(bias)
    return new


def divide_threshold(attention):
    """Let q k^T v be computed from spikes of height 1 instead of theta_q, theta_k, theta_v."""
    neuron = attention.lif
    scale = math.prod(spike_height(part.lif) for part in (attention.q, attention.k, attention.v))
    # The current shrinks by the product of the heights. If v_init and threshold do as well, the
    # spikes stay the same.
    neuron.v_init /= scale
    threshold = neuron.threshold / scale
    # The inverse of softplus, in a form that does not overflow for high thresholds.
    neuron.raw_threshold.copy_(threshold + (-(-threshold).expm1()).log())


@torch.no_grad()
def fold(model):
    """A copy of a network for inference: spikes are 0 or 1, no BatchNorm. Same predictions.

    A neuron that emits theta s into weights W does the same as one that emits s into theta W. So
    neurons emit 0 or 1, and the weights that follow take theta. BatchNorm, a fixed scale and shift
    in evaluation, goes into the weights before it. Where a residual stream adds spikes of
    different thetas, no common weight can absorb them: the spikes of each source stay apart and
    have weights of their own. That takes more memory, but no more spikes, and each spike still
    meets one weight per connection. The head reads means over places: 1 / places counts as part
    of its weights.
    """
    model = copy.deepcopy(model).eval()
    names = {module: name for name, module in model.named_modules()}
    # Weights come first, because they need the thresholds as they were.
    for layer, sources in synapses(model):
        model.set_submodule(names[layer], folded_layer(layer, sources))
    for module in list(model.modules()):
        # Streams are no longer added up but put side by side, as channels of images or of tokens.
        if isinstance(module, SEWBlock):
            module.join = Concatenate(1)
        elif isinstance(module, Spikformer):
            module.join = Concatenate(2)
        elif isinstance(module, SpikingSelfAttention):
            divide_threshold(module)
    for module in model.modules():
        # Neurons of the naive form emit s. Their threshold only decides when.
        if isinstance(module, TrLIF):
            module.surrogate = "absolute"
    return model
