"""A leaky integrate-and-fire layer that trains stably: MP-Init and TrSG. Needs only torch.

    from neuron import TrLIF
    layer = TrLIF()           # learnable threshold (initially 1) and time constant (initially 2)
    spikes = layer(current)   # [T, B, ...] -> [T, B, ...], each value 0 or layer.threshold

Copy this file into your project and use the layer in place of an activation: convolution,
BatchNorm, TrLIF. It takes the input current of all T time steps at once, B samples each, and keeps
no membrane potentials between calls, so there is no state to reset. For input current x[t],
t = 1..T, threshold theta and k = 1 / tau (`decay`, the fraction of its way that v moves in a step):

    charge   h[t] = v[t-1] + k (x[t] - v[t-1])
    fire     s[t] = 1 if h[t] >= theta else 0
    emit     o[t] = theta s[t]
    reset    v[t] = h[t] - theta s[t]             a spike takes theta away ("soft reset")

Two things go wrong when such a layer is trained by backpropagation. This file mends both:

TrSG (threshold-robust surrogate gradient). The jump in "fire" has derivative 0 almost everywhere,
    so training puts another one in its place: 1 in a window around theta, 0 outside. In a window
    of fixed width the size of gradients depends on theta: through the reset, dv/dh = 1 - theta
    inside the window, and how many potentials lie inside changes with theta. Over many layers
    gradients vanish or explode. TrSG measures h in units of theta, r = h / theta, so its window
    grows with theta. That puts a factor 1 / theta into the gradient, and emitting theta s instead
    of s cancels it: do/dh = 1 inside the window, whatever theta is. See `spike`.
MP-Init (membrane potential initialisation). If every potential starts at v[0] = 0, the first time
    steps look different from later ones ("temporal covariate shift"), and the BatchNorm behind the
    next convolution sees all of them with one mean and variance. But a potential forgets its start
    and settles into a stationary distribution. MP-Init starts close to it: v[0] = mu, a running
    mean of the last potential v[T]. It counts only the neurons that fired, because the potentials
    of the others say little about what is emitted. See `TrLIF.update_v_init`.

Source: Kook, Yu, Oh, Park, "Stabilizing Direct Training of Spiking Neural Networks: Membrane
Potential Initialization and Threshold-robust Surrogate Gradient", WACV 2026, arXiv:2511.08708.

The first part of this file is the method. The second part, from "Speed" on, gives the same results
faster and in less memory. You can delete it from a copy if you set COMPILE = False.
"""
import functools
import math
import warnings

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# Whether torch.compile fuses the time loop where that pays. Results differ by rounding only.
COMPILE = True


def spike(h, threshold, surrogate):
    """s: 1 where h >= threshold, else 0, with a surrogate gradient. arXiv:2511.08708.

    A straight-through estimator: its value jumps from 0 to 1 at the threshold, its gradient is that
    of r inside a window. Both edges belong to the window. Where h is NaN or infinite, s is NaN.

    h, threshold   potential before firing and theta, of the same shape and unit
    surrogate      "trsg" or "absolute", the naive form
    """
    fires = (h >= threshold).to(h.dtype)
    if surrogate == "trsg":
        # ds/dr = 1 where |r - 1| <= 1/2. For the emitted o = theta s that makes
        #   do/dh     = theta window / theta            = window        no theta is left
        #   do/dtheta = s - theta window h / theta^2    = s - r window
        r = h / threshold
        window = (r - 1).abs() <= 0.5
    else:
        # ds/dh = 1 where |h - theta| <= 1/2, whatever theta is. This form emits s itself, so theta
        # enters through the reset: dv/dh = 1 - theta window.
        r = h - threshold
        window = r.abs() <= 0.5
    # The bracket is 0, but its gradient is that of r.
    return fires + window * (r - r.detach())


def lif(x, v_init, threshold, decay, surrogate="trsg"):
    """The neuron: integrate the current over T time steps, fire, reset.

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
    # Expanded to every entry of x[0], as a view. Autograd then sums their gradients over the layer
    # once, not once per time step.
    threshold = threshold.to(dtype).expand(x.shape[1:])
    decay = decay.to(dtype).expand(x.shape[1:])
    v = v_init.to(dtype)
    fired = x.new_zeros(x.shape[1:], dtype=torch.bool)
    spikes = []
    for x_t in x.unbind(0):
        # charge   h[t] = v[t-1] + k (x[t] - v[t-1])
        h = v + decay * (x_t.to(dtype) - v)
        # fire     s[t] = 1 if h[t] >= theta else 0
        s = spike(h, threshold, surrogate)
        # emit     o[t] = theta s[t]
        o = threshold * s
        # reset    v[t] = h[t] - theta s[t]
        v = h - o
        # The naive form resets by theta as well, but emits s.
        emitted = o if surrogate == "trsg" else s
        spikes.append(emitted.to(x.dtype))
        fired = fired | (s > 0)
    return spikes, v, fired


def potential_sums(v, fired, average_over):
    """Two numbers whose quotient is MP-Init's mean, a tensor [2] without gradient: the sum of v[T]
    and the number of neurons.

    v, fired      the potential after the last step and which neurons fired, of the same shape
    average_over  "active": the neurons that fired (the paper); "all": every neuron; "off": none,
                  None is returned
    arXiv:2511.08708.
    """
    if average_over == "off":
        return None
    v = v.detach()
    chosen = fired.to(v.dtype) if average_over == "active" else torch.ones_like(v)
    # In two stages, the first of which a GPU can do while it computes v.
    return torch.stack([(v * chosen).sum(-1), chosen.sum(-1)]).reshape(2, -1).sum(1)


def lif_and_sums(x, v_init, threshold, decay, surrogate, average_over):
    """What a layer computes: its spikes [T, ...], and potential_sums."""
    spikes, v, fired = lif(x, v_init, threshold, decay, surrogate)
    return torch.stack(spikes), potential_sums(v, fired, average_over)


class TrLIF(nn.Module):
    """A layer of leaky integrate-and-fire neurons with MP-Init and TrSG.

    threshold  initial theta > 0, in the unit of the current (BatchNorm gives it unit variance)
    tau        initial membrane time constant > 1, in time steps; the decay is k = 1 / tau
    mp_init    "active": start at the running mean over the neurons that fired (the paper);
               "all": at the running mean over every neuron; "off": at 0
    surrogate  "trsg", or "absolute" for the naive form
    momentum   beta, the weight of the newest batch in the running mean
    learnable  whether threshold and tau, one each for the layer, are trained

    forward: current [T, B, ...] -> spikes of the same shape and dtype, with values 0 or theta
    ("trsg"), or 0 or 1 ("absolute"). NaN or infinity in the current gives NaN. In training mode a
    forward updates v_init, in evaluation mode it only reads it, as BatchNorm does with its mean.
    Raises TypeError for a current that is not floating point, ValueError for one without T and B
    or with T = 0. arXiv:2511.08708.

    The first call takes 10 to 20 s while torch.compile builds a kernel, and so does the first call
    with another T or dtype. neuron.COMPILE = False turns that off. Small inputs on a CPU are never
    compiled.

    Limits:
    - In training no torch.utils.checkpoint around a layer: its second run would start elsewhere
      (RuntimeError). A compiled layer keeps nothing but its input anyway.
    - In training no nn.DataParallel, which loses v_init, and no torch.func or vmap.
    - With torch.distributed the mean is that of all processes, and each has to make the call.
    - Second derivatives need COMPILE = False.
    - FSDP (fully_shard) takes no 0-d parameters: list raw_threshold, raw_decay in ignored_params.
    """

    def __init__(self, threshold=1.0, tau=2.0, mp_init="active", surrogate="trsg", momentum=0.1,
                 learnable=True):
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
        self.initial_threshold, self.initial_tau = float(threshold), float(tau)
        self.mp_init, self.surrogate, self.momentum = mp_init, surrogate, momentum
        self.raw_threshold = nn.Parameter(torch.empty(()), requires_grad=learnable)
        self.raw_decay = nn.Parameter(torch.empty(()), requires_grad=learnable)
        # mu, where potentials start. A buffer, so that checkpoints carry it.
        self.register_buffer("v_init", torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self):
        """Set threshold and tau to their initial values and v_init to 0."""
        # theta = softplus(raw) stays above 0, and k = sigmoid(raw) between 0 and 1. These are the
        # inverses of both.
        theta, tau = self.initial_threshold, self.initial_tau
        nn.init.constant_(self.raw_threshold, theta + math.log(-math.expm1(-theta)))
        nn.init.constant_(self.raw_decay, -math.log(tau - 1))
        nn.init.zeros_(self.v_init)

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
        # In evaluation mode the layer starts at mu as well, but mu stays.
        average_over = self.mp_init if self.training else "off"
        if average_over != "off" and not torch.compiler.is_compiling():
            # This id is -1 except in a backward pass, where only torch.utils.checkpoint gets here.
            if torch._C._current_graph_task_id() != -1:
                raise RuntimeError("TrLIF runs again in the backward pass, where it would start "
                                   "from another mean: no torch.utils.checkpoint in training")
        # v[0] = mu. A copy, because mu changes before the backward pass reads it.
        v_init = self.v_init.clone()
        compute = fused_lif_and_sums if COMPILE else lif_and_sums
        spikes, sums = compute(x, v_init, self.threshold, self.decay, self.surrogate, average_over)
        if average_over != "off":
            self.update_v_init(sums)
        return spikes

    def update_v_init(self, sums):
        """mu <- (1 - beta) mu + beta m, m being the mean of v[T]. sums: see potential_sums."""
        if dist.is_available() and dist.is_initialized():
            # Each process sees a part of the batch. Summed before they are divided, these give
            # all of them the mean of the whole batch.
            dist.all_reduce(sums)
        total, count = sums
        m = total / count
        mu = self.v_init.to(m.dtype)
        new = (1 - self.momentum) * mu + self.momentum * m
        # Where no neuron fired, or a potential is NaN or infinite, mu stays.
        new = torch.where(m.isfinite(), new, mu).to(self.v_init.dtype)
        if torch.compiler.is_compiling() and torch.is_grad_enabled():
            # A new tensor, because the compiled backward pass may read the old one again.
            self.v_init = new
        else:
            self.v_init.copy_(new)

    def extra_repr(self):
        text = f"mp_init={self.mp_init!r}, surrogate={self.surrogate!r}"
        if self.v_init.is_meta:
            # There are no values to show.
            return text
        return (f"threshold={self.threshold.item():.4g}, tau={self.tau.item():.4g}, "
                f"v_init={self.v_init.item():.4g}, {text}")


# ---- Speed and memory. Nothing below belongs to the method ---------------------------------------

# The plain loop launches a dozen kernels per time step and keeps each step's potentials for the
# backward pass. Here torch.compile fuses the loop into one kernel, and the backward pass runs the
# loop again from x. as_table brings all inputs into one form, so that layers of all shapes share
# kernels. What each of these is worth: results/speed.md.

# On a CPU a smaller input does not repay the compilation (20 s at T = 16, once).
CPU_COMPILE_FROM = 2 ** 16
# The time to compile grows with T, so a longer input runs in pieces of so many steps (36 s at
# T = 100, instead of minutes).
STEPS_A_KERNEL = 16


def as_table(x):
    """(x as [T, rows, columns], a function that gives such a table the shape of x again).

    Neurons do not interact, so they may be listed in the order in which they lie in memory.
    Contiguous and channels_last inputs become views without a copy.
    """
    listed, undo = x, lambda result: result
    if x.dim() == 5 and not x[0].is_contiguous():
        if x[0].is_contiguous(memory_format=torch.channels_last):
            # [T, B, C, H, W] -> [T, B, H, W, C].
            listed, undo = x.movedim(2, 4), lambda result: result.movedim(4, 2)
    shape = listed.shape
    # Sums go along rows first. A CPU is fastest with one row, a GPU with many of some length: a row
    # of an image, or the channels of a token.
    columns = listed[0].numel() if x.device.type == "cpu" else math.prod(shape[3:] or shape[-1:])
    return listed.reshape(len(x), -1, columns), lambda result: undo(result.reshape(shape))


def lif_recomputed(x, v_init, threshold, decay, surrogate):
    """lif for x [T, rows, columns], keeping nothing but x for the backward pass."""
    # One threshold and decay for each row: their gradients are summed along rows first.
    threshold, decay = threshold.expand(x.shape[1], 1), decay.expand(x.shape[1], 1)
    # The backward pass runs the loop again, which is safe because lif changes nothing. Reading x
    # once more is far cheaper than writing and reading every step's potential. The spikes are
    # stacked outside of the checkpoint, because the next layer keeps them anyway.
    spikes, v, fired = checkpoint(lif, x, v_init, threshold, decay, surrogate,
                                  use_reentrant=False, preserve_rng_state=False)
    return torch.stack(spikes), v, fired


def lif_and_sums_recomputed(x, v_init, threshold, decay, surrogate, average_over):
    """lif_and_sums for x [T, rows, columns]. In one graph, the potentials are never stored."""
    spikes, v, fired = lif_recomputed(x, v_init, threshold, decay, surrogate)
    return spikes, potential_sums(v, fired, average_over)


def compile_options():
    """Options for torch.compile with which a GPU runs the loop, in this layer or in a network that
    is compiled as a whole, as one kernel each way."""
    options = {
        # In a network, BatchNorm is computed in the same kernel and never stored.
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
    # torch stops compiling. This setting is global.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    # With dynamic=True the number of neurons is an argument of a kernel that all layers share.
    return torch.compile(function, dynamic=True, options=compile_options())


def run_compiled(table, v_init, threshold, decay, surrogate, average_over):
    """lif_and_sums_recomputed(...) as compiled kernels, in pieces where T is large."""
    if len(table) <= STEPS_A_KERNEL:
        kernel = compiled(lif_and_sums_recomputed)
        return kernel(table, v_init, threshold, decay, surrogate, average_over)
    v, spikes = v_init.expand(table.shape[1:]), []
    fired = torch.zeros_like(table[0], dtype=torch.bool)
    kernel = compiled(lif_recomputed)
    for piece in table.split(STEPS_A_KERNEL):
        # Each piece starts from the last one's potential, so gradients flow back through all.
        piece_spikes, v, piece_fired = kernel(piece, v, threshold, decay, surrogate)
        spikes.append(piece_spikes)
        fired = fired | piece_fired
    return torch.cat(spikes), potential_sums(v, fired, average_over)


def being_traced():
    """Whether a tracer or transform intercepts each operation (torch.jit.trace, make_fx,
    torch.func, a counter of operations), from which a compiled kernel would hide them."""
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    dispatched = torch.utils._python_dispatch.is_in_torch_dispatch_mode()
    return torch.jit.is_tracing() or transformed or dispatched


class RefuseChanges(torch.autograd.Function):
    """Returns the spikes as they are. Their backward pass raises torch's usual error if the current
    has been modified in place by then."""

    @staticmethod
    def forward(ctx, spikes, table):
        ctx.mark_dirty(spikes)
        ctx.save_for_backward(table)
        return spikes

    @staticmethod
    def backward(ctx, gradient):
        # Whoever asks for a saved tensor that has changed gets the error.
        ctx.saved_tensors
        return gradient, None


def fused_lif_and_sums(x, v_init, threshold, decay, surrogate, average_over):
    """lif_and_sums, compiled where that pays and is possible, else as it stands."""
    global COMPILE
    arguments = v_init, threshold, decay, surrogate, average_over
    if torch.compiler.is_exporting():
        return lif_and_sums(x, *arguments)
    if torch.compiler.is_compiling():
        # A network that is compiled as a whole fuses the loop itself, in one piece.
        table, undo = as_table(x)
        spikes, sums = lif_and_sums_recomputed(table, *arguments)
        return undo(spikes), sums
    small = x.device.type == "cpu" and x.numel() < CPU_COMPILE_FROM
    if small or being_traced():
        return lif_and_sums(x, *arguments)
    if x.is_inference() and not torch.is_inference_mode_enabled():
        # Such a tensor can't be kept for the backward pass. Its copy can.
        x = x.clone()
    table, undo = as_table(x)
    try:
        # _unsafe_view hides that the table is a view. Otherwise torch.compile compiles again for
        # each way in which a view was made.
        spikes, sums = run_compiled(torch.ops.aten._unsafe_view(table, table.shape), *arguments)
    except torch.OutOfMemoryError:
        # A RuntimeError, too, but not the compiler's fault.
        raise
    except (RuntimeError, ImportError, OSError) as error:
        # If the input is at fault and not the compiler, this raises the error again.
        result = lif_and_sums(x, *arguments)
        COMPILE = False
        reason = str(error).strip().partition("\n")[0]
        warnings.warn("neuron.py: torch.compile does not work here, so all layers run eagerly from "
                      f"now on (slower, equal up to rounding): {type(error).__name__}: {reason}")
        return result
    # What the kernel saves has lost the version counter by which torch notices a change.
    return undo(RefuseChanges.apply(spikes, table)), sums
