"""Spiking networks of TrLIF layers, as plain modules: build(arch, ...) returns logits per time step.

    model = build("resnet19", num_classes=100, timesteps=2)
    logits = model(images)              # [B, C, H, W] static, or [B, T, C, H, W] event frames -> [T, B, num_classes]
    prediction = logits.mean(0).argmax(1)

Inside a network a tensor is [T*B, C, H, W], time steps folded into the batch: convolutions, BatchNorm and pooling know
nothing of time. Only the neurons do; `fire` unfolds T for them. Between calls a network holds no state but its weights
and running means.

    resnet19                        CIFAR's: 3x3 stem, stages 128-128-128 / 256-256-256 / 512-512
    resnet18, resnet34              ImageNet's: 7x7 stem and max-pooling, stages of 64-128-256-512
    sew_resnet18, sew_resnet34      the same, each block firing before its shortcut is added (Fang et al. 2021, "ADD")
    spikformer                      Spikformer-4-384 (Zhou et al. 2023): convolutional patches, spiking self attention

Values that travel: between the layers of a resnet 0 or theta, nothing else (the head reads their means). In sew_resnet*
and spikformer the residual streams add the spikes of several layers, each with its own theta; the rest is 0 or theta too.

`python models.py` prints parameters, neurons and multiply-accumulates of each.
"""
import copy
import math

import torch
import torch.nn as nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights
from torch.utils.flop_counter import FlopCounterMode

from neuron import TrLIF, compile_options


def conv(c_in, c_out, kernel, stride=1):
    return nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False)


def fire(neuron, x, T):
    """Run a neuron layer, which wants [T, B, ...], on folded [T*B, ...]."""
    return neuron(x.unflatten(0, (T, -1))).flatten(0, 1)


def input_current(conv_bn, x, timesteps):
    """The stem's current [T, B, C, H, W]. A static image's is computed once and shared by all steps (a view)."""
    if x.dim() == 4:
        return conv_bn(x).expand(timesteps, -1, -1, -1, -1)
    return conv_bn(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (x.shape[1], -1))


def join(x, y, dim, folded):
    """Add spikes y to a residual stream x. In a folded network (see fold) they are 0 or 1 without their thetas, which
    differ: there the summands stay side by side along dim, the channels, each with weights of its own behind it."""
    return torch.cat([x, y], dim) if folded else x + y


class Block(nn.Module):
    """conv-BN-LIF-conv-BN beside a shortcut. Plain: add, then fire. SEW: fire, then add; a convolved shortcut fires too."""

    def __init__(self, c_in, c_out, stride, sew, neuron):
        super().__init__()
        self.conv1, self.bn1, self.lif1 = conv(c_in, c_out, 3, stride), nn.BatchNorm2d(c_out), TrLIF(**neuron)
        self.conv2, self.bn2, self.lif2 = conv(c_out, c_out, 3), nn.BatchNorm2d(c_out), TrLIF(**neuron)
        self.sew, self.folded = sew, False
        self.shortcut = self.lif_shortcut = None
        if stride != 1 or c_in != c_out:                         # the shape changes: a 1x1 convolution adapts it
            self.shortcut = nn.Sequential(conv(c_in, c_out, 1, stride), nn.BatchNorm2d(c_out))
            self.lif_shortcut = TrLIF(**neuron) if sew else None

    def forward(self, x, T):
        y = fire(self.lif1, self.bn1(self.conv1(x)), T)
        y = self.bn2(self.conv2(y))
        if self.shortcut is not None:
            x = self.shortcut(x)
        if not self.sew:
            return fire(self.lif2, y + x, T)
        if self.lif_shortcut is not None:
            x = fire(self.lif_shortcut, x, T)
        return join(x, fire(self.lif2, y, T), 1, self.folded)


class ResNet(nn.Module):
    """stages: (channels, blocks, stride) each. imagenet: the 7x7/2 stem with max-pooling instead of the 3x3 one."""

    def __init__(self, stages, num_classes, timesteps, in_channels, width, neuron, imagenet=False, sew=False):
        super().__init__()
        self.timesteps = timesteps
        self.stem = nn.Sequential(conv(in_channels, width, 7, 2) if imagenet else conv(in_channels, width, 3),
                                  nn.BatchNorm2d(width))
        self.lif = TrLIF(**neuron)
        self.pool = nn.MaxPool2d(3, 2, 1) if imagenet else nn.Identity()
        self.blocks, c = nn.ModuleList(), width
        for c_out, blocks, stride in stages:
            for i in range(blocks):
                self.blocks.append(Block(c, c_out, stride if i == 0 else 1, sew, neuron))
                c = c_out
        self.head = nn.Linear(c, num_classes)

    def forward(self, x):
        x = input_current(self.stem, x, self.timesteps)
        T = x.shape[0]
        x = self.pool(self.lif(x).flatten(0, 1))
        for block in self.blocks:
            x = block(x, T)
        return self.head(x.mean((2, 3))).unflatten(0, (T, -1))


class SpikingSelfAttention(nn.Module):
    """softmax-free attention between spikes: LIF(q k^T v / 8). x [T*B, N tokens, D]."""

    def __init__(self, dim, heads, neuron):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (LinearLIF(dim, dim, neuron) for _ in range(4))
        self.lif = TrLIF(**{**neuron, "threshold": 0.5 * neuron.get("threshold", 1.0)})  # half as high, as in the publication

    def forward(self, x, T):
        q, k, v = (layer(x, T).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        # Without a softmax (q k^T) v = q (k^T v), and the right side never forms the N x N matrix.
        y = q @ (k.transpose(2, 3) @ v) * 0.125
        return self.out(fire(self.lif, y.transpose(1, 2).flatten(2), T), T)


class LinearLIF(nn.Module):
    """linear-BN-LIF on tokens, x [T*B, N, C_in] -> [T*B, N, C_out]."""

    def __init__(self, c_in, c_out, neuron):
        super().__init__()
        self.linear, self.bn, self.lif = nn.Linear(c_in, c_out), nn.BatchNorm1d(c_out), TrLIF(**neuron)

    def forward(self, x, T):
        y = self.linear(x)
        return fire(self.lif, self.bn(y.flatten(0, 1)).view_as(y), T)


class Spikformer(nn.Module):
    """Patch splitting to tokens of 6 * width, then 4 blocks of attention and MLP, each adding its spikes to x."""

    def __init__(self, num_classes, timesteps, in_channels, width, neuron, depth=4, heads=12):
        super().__init__()
        self.timesteps, self.folded = timesteps, False
        dim = 6 * width
        channels = [in_channels, dim // 8, dim // 4, dim // 2, dim, dim]
        self.patches = nn.ModuleList(nn.Sequential(conv(a, b, 3), nn.BatchNorm2d(b))
                                     for a, b in zip(channels, channels[1:]))
        self.lifs = nn.ModuleList(TrLIF(**neuron) for _ in self.patches)
        self.pools = nn.ModuleList(nn.MaxPool2d(3, 2, 1) if i in (2, 3) else nn.Identity() for i in range(4))
        self.attention = nn.ModuleList(SpikingSelfAttention(dim, heads, neuron) for _ in range(depth))
        self.mlp = nn.ModuleList(nn.ModuleList([LinearLIF(dim, 4 * dim, neuron), LinearLIF(4 * dim, dim, neuron)])
                                 for _ in range(depth))
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x):
        x = input_current(self.patches[0], x, self.timesteps)
        T = x.shape[0]
        x = self.pools[0](self.lifs[0](x).flatten(0, 1))
        for patch, lif, pool in zip(self.patches[1:4], self.lifs[1:4], self.pools[1:]):
            x = pool(fire(lif, patch(x), T))
        x = join(x, fire(self.lifs[4], self.patches[4](x), T), 1, self.folded)  # embeds positions
        x = x.flatten(2).transpose(1, 2)                         # [T*B, N, D]
        for attention, (up, down) in zip(self.attention, self.mlp):
            x = join(x, attention(x, T), 2, self.folded)
            x = join(x, down(up(x, T), T), 2, self.folded)
        return self.head(x.mean(1)).unflatten(0, (T, -1))


ARCHS = ("resnet19", "resnet18", "resnet34", "sew_resnet18", "sew_resnet34", "spikformer")


def build(arch, num_classes, timesteps, in_channels=3, width=64, **neuron_options):
    """Build a network.

    arch            one of ARCHS
    timesteps       T for static images; event frames bring their own
    in_channels     3 for colour images, 2 for event frames
    width           the stem's channels in a resnet, a sixth of the embedding in spikformer (a multiple of 4): 64 is
                    the published network, small values make narrow ones for small machines
    neuron_options  handed to every TrLIF: threshold, tau, mp_init, surrogate, momentum, learnable, check

    forward: [B, C, H, W] or [B, T, C, H, W] -> logits [T, B, num_classes]. Raises ValueError for what it can't build.
    """
    if arch not in ARCHS:
        raise ValueError(f"unknown arch {arch!r}: choose one of {', '.join(ARCHS)}")
    for name, value in (("num_classes", num_classes), ("timesteps", timesteps), ("in_channels", in_channels),
                        ("width", width)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number above 0, not {value!r}")
    common = num_classes, timesteps, in_channels, width, neuron_options
    w = width
    if arch == "spikformer":
        if w % 4:
            raise ValueError(f"spikformer's width must be a multiple of 4, not {w}: 12 heads share 6 * width channels, and the first "
                             "convolution has an eighth of them")
        model = Spikformer(*common)
    elif arch == "resnet19":
        model = ResNet([(2 * w, 3, 1), (4 * w, 3, 2), (8 * w, 2, 2)], *common)
    else:
        blocks = (2, 2, 2, 2) if arch.endswith("18") else (3, 4, 6, 3)
        stages = [(w * 2 ** i, n, 1 if i == 0 else 2) for i, n in enumerate(blocks)]
        model = ResNet(stages, *common, imagenet=True, sew=arch.startswith("sew"))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


@torch.no_grad()
def scale_currents(model, threshold):
    """Multiply every BatchNorm's weight, 1 at the start, by theta, in place (as in tdBN, Zheng et al. 2021). Returns the model.

    Input currents then have deviation theta at the start, and another initial threshold is a mere change of units. TrSG
    does not notice it: a layer emits theta s, the next BatchNorm divides by that theta and multiplies by its weight.
    Not so in spikformer's attention, where no BatchNorm follows the product of three spikes: it scales with theta^3.
    """
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.weight *= threshold
    return model


@torch.no_grad()
def start_near_identity(model):
    """Let every block of a plain resnet start out passing on what comes over its shortcut, in place. Returns the model.

    A block that fires after its addition has no path around the neuron: 16 of them in a row garble what they carry before
    training has begun. For ReLUs the remedy is a last BatchNorm that starts at 0 (Goyal et al. 2017). A neuron needs a bias
    besides, or the shortcut's spike alone would not reach its threshold. With bias b, from v[0] = 0, h[1] is

        k b   without a spike,   k (b + a)   with one of height a:   as far below theta as above it if   b = theta / k - a / 2

    Without spikes the potential settles at b. Raises ValueError where tau is too large for b to lie below theta, and for
    networks that add spikes behind the neuron, which have a path around it.
    """
    if not isinstance(model, ResNet) or model.blocks[0].sew:
        raise ValueError("near_identity is for resnet18, resnet19 and resnet34: the others add spikes behind the neuron, leave it out")
    for block in model.blocks:
        neuron = block.lif2
        spike = neuron.threshold if neuron.surrogate == "trsg" else 1.0
        bias = neuron.threshold * neuron.tau - spike / 2
        if bias >= neuron.threshold:
            raise ValueError(f"near_identity needs a tau below {1 + spike / (2 * neuron.threshold):.3g}, not {neuron.tau:.3g}: "
                             "neurons would fire without a spike")
        nn.init.constant_(block.bn2.weight, 0.1 * spike)         # a small disturbance beside the spike
        nn.init.constant_(block.bn2.bias, bias)
    return model


def compile_model(model):
    """Fuse the whole network with torch.compile, in place: BatchNorm's application, the shortcuts' additions and the
    neurons then share kernels. Takes minutes once, and again for evaluation; rounding may differ. Returns the model."""
    model.compile(dynamic=False, options=compile_options())
    return model


def wiring(model):
    """Which spikes reach which weights, by the names of modules, as forward has it: (synapses, pooled).

    synapses  in the order of computation, (layer, its BatchNorm or None, [neuron layers whose spikes arrive, added up]); the
              shortcut of a plain resnet is among them where it has no convolution, too
    pooled    {neuron layer: the pooling through which its spikes leave}
    """
    if isinstance(model, Spikformer):
        synapses = [(f"patches.{i}.0", f"patches.{i}.1", [f"lifs.{i - 1}"] if i else []) for i in range(5)]
        stream = ["lifs.3", "lifs.4"]
        for i in range(len(model.mlp)):
            for first, inside, last in (([f"attention.{i}.{part}" for part in "qkv"], f"attention.{i}.lif", f"attention.{i}.out"),
                                        ([f"mlp.{i}.0"], f"mlp.{i}.0.lif", f"mlp.{i}.1")):
                synapses += [(f"{name}.linear", f"{name}.bn", stream) for name in first]
                synapses += [(f"{last}.linear", f"{last}.bn", [inside])]
                stream = stream + [f"{last}.lif"]
        return synapses + [("head", None, stream)], {f"lifs.{i}": f"pools.{i}" for i in range(4)}
    synapses, stream = [("stem.0", "stem.1", [])], ["lif"]
    for i, block in enumerate(model.blocks):
        b, adapts = f"blocks.{i}", isinstance(block.shortcut, nn.Sequential)          # fold makes a lone convolution of an identity
        if adapts:
            synapses.append((f"{b}.shortcut.0", f"{b}.shortcut.1", stream))
        elif not block.sew:
            synapses.append((f"{b}.shortcut", None, stream))
        synapses += [(f"{b}.conv1", f"{b}.bn1", stream), (f"{b}.conv2", f"{b}.bn2", [f"{b}.lif1"])]
        beside = [f"{b}.lif_shortcut"] if adapts else stream     # what a SEW block adds its spikes to
        stream = (beside if block.sew else []) + [f"{b}.lif2"]
    return synapses + [("head", None, stream)], {"lif": "pool"}


@torch.no_grad()
def fold(model):
    """A copy of a network for inference whose spikes are all 1 and which has no BatchNorm. Same predictions.

    A neuron that emits theta s into weights W does what one does that emits s into theta W. So every neuron layer emits
    0 or 1, its threshold only deciding when, and the weights behind it take theta; the shortcuts of a plain resnet become
    one weight a spike. q k^T v meets no weights: there the thetas of the factors divide the threshold behind the product.
    BatchNorm, a fixed scale and shift here, goes into weights and bias before it. The residual streams of sew_resnet* and
    spikformer add spikes of different thetas, which no common weight can absorb: there the spikes of each source stay
    apart (join), and layers behind have a weight set a source. That costs memory, but no operations: each spike
    still meets one weight a connection. The head reads means over places: 1 / places counts as part of its weights.
    """
    model = copy.deepcopy(model).eval()
    layers = dict(model.named_modules())
    # theta: the height of a layer's spikes, which "absolute" neurons emit as 1
    theta = {name: layer.threshold if layer.surrogate == "trsg" else torch.ones_like(layer.threshold)
             for name, layer in layers.items() if isinstance(layer, TrLIF)}
    for name, bn, sources in wiring(model)[0]:
        layer, (parent, _, last) = layers.get(name), name.rpartition(".")
        if layer is None:                                        # a shortcut: one connection, of weight theta, a channel
            channels = layers[f"{parent}.conv2"].out_channels
            weight, bias = theta[sources[0]].expand(channels, 1, 1, 1), None
            new = nn.Conv2d(channels, channels, 1, groups=channels, bias=False)
        else:
            weight = torch.cat([layer.weight * theta[s] for s in sources], 1) if sources else layer.weight
            bias = layer.bias
            if bn:
                fuse, norm = fuse_linear_bn_weights if isinstance(layer, nn.Linear) else fuse_conv_bn_weights, layers[bn]
                weight, bias = fuse(weight, bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
                setattr(layers[bn.rpartition(".")[0]], bn.rpartition(".")[2], nn.Identity())
            new = (nn.Linear(*weight.T.shape) if isinstance(layer, nn.Linear) else
                   nn.Conv2d(weight.shape[1], len(weight), layer.kernel_size, layer.stride, layer.padding))
        new.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format))
        new.bias = None if bias is None else nn.Parameter(bias.clone())
        setattr(layers[parent], last, new)
    for name, layer in layers.items():
        if isinstance(layer, SpikingSelfAttention):       # current, start and threshold divided alike: same spikes
            scale = math.prod(theta[f"{name}.{part}.lif"] for part in "qkv")
            layer.lif.v_init /= scale
            threshold = layer.lif.threshold / scale
            layer.lif.raw_threshold.copy_(threshold + (-(-threshold).expm1()).log())         # the inverse of softplus
        if isinstance(layer, TrLIF):
            layer.surrogate = "absolute"                         # which emits s
        if hasattr(layer, "folded"):
            layer.folded = True
    return model


def macs_per_step(model, x):
    """Multiply-accumulates of one forward of x (one time step if timesteps = 1): convolutions, linear layers, attention.
    Leaves the model in evaluation mode."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(x)
    return counter.get_total_flops() // 2


if __name__ == "__main__":
    print(f"{'arch':14s} {'input':>12s} {'classes':>8s} {'parameters':>12s} {'neuron layers':>14s} {'MACs a step':>16s}")
    for arch in ARCHS:
        size, classes = {"resnet19": (32, 100), "spikformer": (32, 10)}.get(arch, (224, 1000))
        model = build(arch, classes, timesteps=1)
        parameters = sum(p.numel() for p in model.parameters())
        neurons = sum(isinstance(m, TrLIF) for m in model.modules())
        macs = macs_per_step(model, torch.zeros(1, 3, size, size))
        print(f"{arch:14s} {f'3x{size}x{size}':>12s} {classes:8d} {parameters:12,d} {neurons:14d} {macs:16,d}")
