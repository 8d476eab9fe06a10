"""A leaky integrate-and-fire layer that trains stably: MP-Init and TrSG. Needs torch alone.

    from neuron import TrLIF
    layer = TrLIF()           # learnable threshold (starts at 1) and leak (starts at tau = 2)
    spikes = layer(current)   # [T, B, ...] -> [T, B, ...], each value 0 or layer.threshold

Copy this file into your project. A layer takes the input current of all T time steps at once and
keeps no potentials between calls: there is no state to reset. For input current x[t], t = 1..T,
threshold theta and decay k = 1 / tau:

    charge   h[t] = v[t-1] + k (x[t] - v[t-1])    the potential leaks towards the input current
    fire     s[t] = 1 if h[t] >= theta else 0
    emit     o[t] = theta s[t]
    reset    v[t] = h[t] - theta s[t]             a spike takes theta away ("soft reset")

Two things go wrong when such a layer is trained directly. Each has its remedy here:

TrSG (threshold-robust surrogate gradient). The step in "fire" has derivative 0 almost everywhere.
    Training puts another one in its place: 1 in a window around theta, 0 outside. If the window
    has a fixed width, gradients vanish or explode once a learnable theta drifts away from 1.
    TrSG takes s as a function of the ratio r = h / theta and emits theta s: this theta cancels
    the 1 / theta of dr/dh, and no theta is left in do/dh. See `Emit`.
MP-Init (membrane potential initialisation). A potential that starts at v[0] = 0 has another
    distribution in the first time steps than in later ones ("temporal covariate shift"), and one
    BatchNorm has to serve them all. The potential forgets its start, though, and settles into
    one distribution. MP-Init starts near its mean: v[0] = mu, and mu <- (1 - beta) mu + beta m
    after each batch in training, m being the mean of v[T] over the neurons that fired. The
    layer keeps mu as `v_init`. See `mean_potential` and `TrLIF.forward`.

Source: Kook, Yu, Oh, Park, "Stabilizing Direct Training of Spiking Neural Networks: Membrane
Potential Initialization and Threshold-robust Surrogate Gradient", WACV 2026, arXiv:2511.08708.

This file imports nothing of the project. Its first part is the method, its second part (from
"Speed" on) only saves time and memory: in a copy, set COMPILE to False and you may delete it.
"""
import functools
import math
import warnings

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# Whether the time loop runs as one fused kernel where that pays (second part of this file). The
# results differ by rounding. False is needed for gradients of gradients (create_graph=True).
COMPILE = True


class Emit(torch.autograd.Function):
    """Forward: o = theta where a neuron fires, else 0. `lif` takes o from the potential; with TrSG
    it is also what the neuron emits. Backward: the surrogate derivative of s.

    s          bool, which neurons fire: h >= threshold. h, threshold and the result have its shape
    surrogate  "trsg": s as a function of r = h / theta, ds/dr = 1 where |r - 1| <= 1/2, else 0
               "absolute", the naive form: ds/dh = 1 where |h - theta| <= 1/2, else 0
    arXiv:2511.08708.
    """

    @staticmethod
    def forward(ctx, s, h, threshold, surrogate):
        ctx.save_for_backward(s, h, threshold)
        ctx.surrogate = surrogate
        return torch.where(s, threshold, 0)

    @staticmethod
    def backward(ctx, gradient):
        s, h, threshold = ctx.saved_tensors
        s = s.to(h.dtype)
        if ctx.surrogate == "trsg":
            # 1 / threshold is the same at every step: fused, it is divided once.
            r = h * (1 / threshold)
            window = (r - 1).abs() <= 0.5
            # do/dh = theta ds/dr dr/dh = theta window / theta: no theta is left.
            do_dh = window
            # do/dtheta = s + theta ds/dr dr/dtheta = s - theta window h / theta^2 = s - r window
            do_dthreshold = s - r * window
        else:
            window = (h - threshold).abs() <= 0.5
            # do/dh = theta ds/dh: theta stays, and through the reset dv/dh = 1 - theta.
            do_dh = threshold * window
            # do/dtheta = s + theta ds/dtheta = s - theta window
            do_dthreshold = s - threshold * window
        return None, gradient * do_dh, gradient * do_dthreshold, None


def lif(x, v_init, threshold, decay, surrogate="trsg"):
    """The neuron: integrate the current over T steps, fire, reset. Its only definition.

    x          [T, ...] input current, floating point
    v_init     potential before the first step, 0-d or of the shape x[0], in the unit of x
    threshold  theta > 0, 0-d or of a shape that expands to that of x[0], in the unit of x
    decay      k = 1 / tau in (0, 1), likewise
    surrogate  "trsg" emits theta s; "absolute", the naive form kept for comparison, emits s

    Returns (spikes, v, fired): a list of T tensors [...] in x's dtype, the potential [...] after
    the last step (float32 at least), and bool [...], which neurons fired at least once.
    Differentiable in all four tensors, through the reset as well. arXiv:2511.08708.
    """
    # Currents in bfloat16 still integrate in float32.
    dtype = torch.promote_types(x.dtype, torch.float32)
    # One threshold and one decay per neuron (a view, no memory): their gradients then add up
    # neuron by neuron and are summed over the layer once, at the end.
    threshold = threshold.to(dtype).expand(x.shape[1:])
    decay = decay.to(dtype).expand(x.shape[1:])
    v = v_init.to(dtype)
    fired = x.new_zeros(x.shape[1:], dtype=torch.bool)
    spikes = []
    for x_t in x.unbind(0):
        # charge   h[t] = v[t-1] + k (x[t] - v[t-1])
        h = v + decay * (x_t.to(dtype) - v)
        # fire     s[t] = 1 if h[t] >= theta else 0
        s = h >= threshold
        # emit     o[t] = theta s[t]
        o = Emit.apply(s, h, threshold, surrogate)
        # reset    v[t] = h[t] - theta s[t]
        v = h - o
        # The naive form takes theta from the potential, but emits s.
        emitted = o if surrogate == "trsg" else o / threshold
        spikes.append(emitted.to(x.dtype))
        fired = fired | s
    return spikes, v, fired


def mean_potential(v, fired, v_init, mp_init, distributed):
    """MP-Init's m: the mean of v = v[T] over the neurons that fired, a 0-d tensor.

    v, fired   the potential after the last step and which neurons fired, [rows, columns]
    v_init     what is returned where no neuron fired, or a potential is NaN or infinite
    mp_init    "active": over the neurons that fired (the paper), because the potentials of the
               others say little about what is emitted; "all": over every neuron; "off": no mean,
               None is returned
    arXiv:2511.08708.
    """
    if mp_init == "off":
        return None
    v = v.detach()
    chosen = fired.to(v.dtype) if mp_init == "active" else torch.ones_like(v)
    # Row by row first, which a GPU does in passing while it computes v.
    total_and_count = torch.stack([(v * chosen).sum(1), chosen.sum(1)]).sum(1)
    if distributed:
        # Every process sees a part of the batch: sum first, divide after, and N equal one.
        dist.all_reduce(total_and_count)
    m = total_and_count[0] / total_and_count[1]
    return torch.where(m.isfinite(), m, v_init)


def lif_and_mean(x, v_init, threshold, decay, surrogate, mp_init, distributed):
    """What a layer computes: its spikes [T, ...], and m (None where mp_init is "off")."""
    spikes, v, fired = lif(x, v_init, threshold, decay, surrogate)
    v, fired = v.reshape(1, -1), fired.reshape(1, -1)
    return torch.stack(spikes), mean_potential(v, fired, v_init, mp_init, distributed)


class TrLIF(nn.Module):
    """A layer of leaky integrate-and-fire neurons with MP-Init and TrSG.

    threshold  initial theta > 0, in the unit of the current (BatchNorm gives it unit variance)
    tau        initial membrane time constant > 1, in time steps; the decay is k = 1 / tau
    mp_init    "active": start at the running mean over neurons that fired (the paper);
               "all": at that over every neuron; "off": v_init stays as it is, at 0
    surrogate  "trsg", or "absolute" for the naive form
    momentum   beta, the weight of the newest batch in the running mean
    learnable  whether threshold and tau, one each for the layer, are trained
    check      look for NaN and infinity in every input (this waits for the device)

    forward: current [T, B, ...] -> spikes of the same shape and dtype, with values 0 or theta, in
    that dtype ("trsg"), or 0 or 1 ("absolute"). Raises TypeError for a current that is not
    floating point, ValueError for one without T and B, with T = 0, or not finite (check).
    arXiv:2511.08708.

    Limits:
    - Each forward in training replaces v_init. So in training no torch.utils.checkpoint around a
      layer, which would run it again from another start (RuntimeError; fused, a layer keeps only
      its input anyway), no nn.DataParallel and no CUDA graphs captured by hand, which lose it.
    - With torch.distributed m is that of all processes, and each has to make the call.
    - Second derivatives need COMPILE = False. torch.func and vmap do not work.
    - FSDP (fully_shard) takes no 0-d parameters: list raw_threshold, raw_decay in ignored_params.
    - In float32 the threshold's gradient is NaN where raw_threshold is below -88 (theta 1e-38).
    """

    def __init__(self, threshold=1.0, tau=2.0, mp_init="active", surrogate="trsg", momentum=0.1,
                 learnable=True, check=False):
        super().__init__()
        if not 0 < threshold < math.inf:
            raise ValueError(f"threshold must be above 0 and finite, not {threshold}")
        if not 1 < tau < math.inf:
            raise ValueError(f"tau must be above 1 and finite (1 / tau is the decay), not {tau}")
        if mp_init not in ("active", "all", "off"):
            raise ValueError(f"mp_init must be 'active', 'all' or 'off', not {mp_init!r}")
        if surrogate not in ("trsg", "absolute"):
            raise ValueError(f"surrogate must be 'trsg' or 'absolute', not {surrogate!r}")
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be from 0 to 1, not {momentum}")
        # Trained in raw form, by the inverses of softplus and sigmoid: theta stays above 0, and
        # k between 0 and 1.
        raw_threshold = torch.tensor(float(threshold + math.log(-math.expm1(-threshold))))
        raw_decay = torch.tensor(-math.log(tau - 1))
        self.raw_threshold = nn.Parameter(raw_threshold, requires_grad=learnable)
        self.raw_decay = nn.Parameter(raw_decay, requires_grad=learnable)
        # mu, where potentials start. A buffer, so that checkpoints carry it.
        self.register_buffer("v_init", torch.zeros(()))
        self.mp_init = mp_init
        self.surrogate = surrogate
        self.momentum = momentum
        self.check = check

    @property
    def threshold(self):
        """theta = softplus(raw_threshold), a 0-d tensor."""
        return F.softplus(self.raw_threshold)

    @property
    def decay(self):
        """k = sigmoid(raw_decay), a 0-d tensor."""
        return torch.sigmoid(self.raw_decay)

    @property
    def tau(self):
        """tau = 1 / k, a 0-d tensor, in time steps."""
        return 1 / self.decay

    def forward(self, x):
        if not x.is_floating_point():
            raise TypeError(f"TrLIF needs a floating-point current, not {x.dtype}: use .float()")
        if x.dim() < 2 or x.shape[0] == 0:
            raise ValueError(f"TrLIF needs a current [T, B, ...] with T >= 1, not {list(x.shape)}")
        if self.check and not x.isfinite().all():
            raise ValueError("TrLIF's input current holds NaN or infinity")
        mp_init = self.mp_init if self.training else "off"
        distributed = dist.is_available() and dist.is_initialized()
        if mp_init != "off" and not torch.compiler.is_compiling():
            # torch.utils.checkpoint runs a layer again inside the backward pass. Only there this
            # number is not -1. After the loop it would be too late to ask, since checkpoint breaks
            # that run off once it has what it needs.
            if torch._C._current_graph_task_id() != -1:
                raise RuntimeError("TrLIF runs again in the backward pass, where it would start "
                                   "from another mean: no torch.utils.checkpoint in training")
        # v[0] = mu, and no gradient through mu.
        compute = fused_lif_and_mean if COMPILE else lif_and_mean
        spikes, m = compute(x, self.v_init, self.threshold, self.decay, self.surrogate, mp_init,
                            distributed)
        if m is not None:
            # mu <- (1 - beta) mu + beta m. A new tensor instead of one changed in place: the
            # backward pass that is still to come runs the loop again from the old value.
            self.v_init = self.v_init.to(m.dtype).lerp(m, self.momentum).to(self.v_init.dtype)
        return spikes

    def extra_repr(self):
        return (f"threshold={self.threshold.item():.4g}, tau={self.tau.item():.4g}, "
                f"v_init={self.v_init.item():.4g}, mp_init={self.mp_init!r}, "
                f"surrogate={self.surrogate!r}")


# ---- Speed and memory. Nothing below belongs to the method: lif_and_mean as one fused kernel ----

# On a CPU an input of fewer elements does not repay the compilation (20 s at T = 16, once).
CPU_COMPILE_FROM = 2 ** 16
# Compiling takes longer the longer the loop is. More steps run in pieces of so many, so that it
# takes 36 s at T = 100 instead of minutes.
STEPS_A_KERNEL = 16
# Variants of calls, (device, T, dtype, ...), for which compiling failed: they run unfused.
FAILED = set()


def lif_recomputed(x, v_init, threshold, decay, surrogate):
    """lif for x [T, rows, columns], keeping nothing but x for the backward pass."""
    # One threshold and decay for each row, so that their gradients, too, are summed by rows first.
    threshold, decay = threshold.expand(x.shape[1], 1), decay.expand(x.shape[1], 1)
    # Backward runs the loop again from x. Reading x once more is far cheaper than writing and
    # reading every step's potential. The spikes are stacked outside of the checkpoint, because the
    # next layer keeps them anyway and backward need not compute them again.
    spikes, v, fired = checkpoint(lif, x, v_init, threshold, decay, surrogate,
                                  use_reentrant=False, preserve_rng_state=False)
    return torch.stack(spikes), v, fired


def lif_and_mean_recomputed(x, v_init, threshold, decay, surrogate, mp_init, distributed):
    """lif_and_mean for x [T, rows, columns], in one graph, so that v[T] is never stored."""
    spikes, v, fired = lif_recomputed(x, v_init, threshold, decay, surrogate)
    return spikes, mean_potential(v, fired, v_init, mp_init, distributed)


def compile_options():
    """Options for torch.compile with which a GPU runs the loop as one kernel each way."""
    options = {
        # BatchNorm before the loop is computed in the same kernel, never stored.
        "realize_acc_reads_threshold": 32,
        # Each step's spikes are written where they belong, not gathered by a second kernel. The
        # second of these names is that of torch 2.13 and later.
        "max_pointwise_cat_inputs": 0,
        "max_complex_pointwise_cat_inputs": 0,
    }
    known = torch._inductor.list_options()
    return {name: value for name, value in options.items() if name in known}


@functools.cache
def compiled(function):
    # Each T, dtype and mode needs a kernel of its own. These are soon more than the 8 after which
    # torch stops compiling.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    # With dynamic=True the number of neurons is an argument of a kernel that all layers share.
    return torch.compile(function, dynamic=True, options=compile_options())


def run_compiled(table, v_init, threshold, decay, surrogate, mp_init, distributed):
    """lif_and_mean_recomputed(...) as compiled kernels, in pieces where T is large."""
    if len(table) <= STEPS_A_KERNEL:
        kernel = compiled(lif_and_mean_recomputed)
        return kernel(table, v_init, threshold, decay, surrogate, mp_init, distributed)
    v, spikes = v_init.expand(table.shape[1:]), []
    fired = torch.zeros_like(table[0], dtype=torch.bool)
    # The potential is carried on from piece to piece, and the gradient through it back.
    kernel = compiled(lif_recomputed)
    for piece in table.split(STEPS_A_KERNEL):
        piece_spikes, v, piece_fired = kernel(piece, v, threshold, decay, surrogate)
        spikes.append(piece_spikes)
        fired = fired | piece_fired
    return torch.cat(spikes), mean_potential(v, fired, v_init, mp_init, distributed)


def being_traced():
    """Whether a tracer or transform intercepts each operation (torch.jit.trace, make_fx,
    torch.func, a counter of operations), from which a compiled kernel would hide them."""
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    dispatched = torch.utils._python_dispatch.is_in_torch_dispatch_mode()
    return torch.jit.is_tracing() or transformed or dispatched


def as_table(x):
    """(x as [T, rows, columns], a function that gives such a table the shape of x again).

    Neurons do not interact, so they may be listed in the order in which they lie in memory.
    Contiguous and channels_last inputs both become views without a copy, and layers of all shapes
    share kernels.
    """
    order = sorted(range(1, x.dim()), key=x.stride, reverse=True)
    if not x.permute(0, *order)[0].is_contiguous():
        order, x = list(range(1, x.dim())), x.contiguous()
    listed = x.permute(0, *order)
    # A CPU sums fastest in one row, a GPU needs many. The columns must divide the neurons.
    neurons = x[0].numel()
    columns = max(neurons, 1) if x.device.type == "cpu" else math.gcd(neurons, 2048)
    # The inverse permutation.
    back = [0] + [1 + order.index(dim) for dim in range(1, x.dim())]
    table = listed.reshape(len(x), -1, columns)
    return table, lambda result: result.reshape(listed.shape).permute(back)


def fused_lif_and_mean(x, v_init, threshold, decay, surrogate, mp_init, distributed):
    """lif_and_mean, fused where that pays and is possible, else as it stands."""
    arguments = v_init, threshold, decay, surrogate, mp_init, distributed
    if torch.compiler.is_compiling():
        # A network that is compiled as a whole fuses the loop itself.
        table, undo = as_table(x)
        spikes, m = lif_and_mean_recomputed(table, *arguments)
        return undo(spikes), m
    small = x.device.type == "cpu" and x.numel() < CPU_COMPILE_FROM
    variant = x.device.type, len(x), x.dtype, surrogate, mp_init, torch.is_grad_enabled()
    if small or being_traced() or variant in FAILED:
        return lif_and_mean(x, *arguments)
    table, undo = as_table(x)
    try:
        # torch.compile compiles anew for each way in which a view was made. It does not know that
        # the result of _unsafe_view is one.
        table = torch.ops.aten._unsafe_view(table, table.shape)
        spikes, m = run_compiled(table, *arguments)
        return undo(spikes), m
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ImportError, OSError) as error:
        # If the input is at fault and not the compiler, this raises the error again.
        result = lif_and_mean(x, *arguments)
        FAILED.add(variant)
        reason = str(error).strip().partition("\n")[0]
        warnings.warn(f"neuron.py: torch.compile does not work here for T = {len(x)}, so this "
                      f"layer runs operation by operation (slower, equal up to rounding): "
                      f"{type(error).__name__}: {reason}")
        return result
