"""A leaky integrate-and-fire layer that trains stably: MP-Init and TrSG, in one file that needs torch alone.

    from neuron import TrLIF
    lif = TrLIF()                # learnable threshold (starts at 1) and leak (starts at tau = 2)
    spikes = lif(current)        # [T, B, ...] -> [T, B, ...], each value 0 or lif.threshold

Copy this file into your project. A layer takes the input current of all T time steps at once and keeps no potentials
between calls, so there is no state to reset. For input current x[t], t = 1..T, threshold theta and decay k = 1/tau:

    charge   h[t] = v[t-1] + k (x[t] - v[t-1])        the membrane potential leaks towards the input current
    fire     s[t] = 1 if h[t] >= theta else 0
    emit     o[t] = theta s[t]
    reset    v[t] = h[t] - theta s[t]                 a spike takes theta away from the potential ("soft reset")

Two things go wrong when such a layer is trained directly, and each has a remedy here:

TrSG (threshold-robust surrogate gradient). The derivative of the step s[t] is 0 almost everywhere. Training puts that
    of a surrogate in its place: 1 in a window around theta, 0 outside. If the window has a fixed width, gradients
    vanish or explode once a learnable theta drifts away from 1. TrSG takes s as a function of the ratio r = h / theta
    and emits theta s: this theta cancels the 1 / theta of dr/dh, and no theta is left in do/dh. See `Emit`.
MP-Init (membrane potential initialisation). A potential that starts at v[0] = 0 has another distribution in the first
    time steps than in the later ones ("temporal covariate shift"), and one BatchNorm has to serve them all. It
    forgets its start, though, and settles into a stationary law. So MP-Init starts near that law's mean: at a running
    mean of the potentials after the last step, over the neurons that fired. See `TrLIF.forward`.

Source: Kook, Yu, Oh, Park, "Stabilizing Direct Training of Spiking Neural Networks: Membrane Potential Initialization
and Threshold-robust Surrogate Gradient", WACV 2026, arXiv:2511.08708.

`python neuron.py` times the layer on this machine against the memory traffic that no implementation can avoid.
"""
import functools
import math
import threading
import warnings

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# Run the time loop as one fused kernel (torch.compile) where that pays: on a GPU, and on a CPU from this many input
# elements on. (Fused was faster at every size tried; compiling takes some ten seconds, a few hundred such calls repay it.)
# False: always operation by operation; results then differ by rounding. Needed for gradients of gradients
# (create_graph=True), which torch.compile does not have.
COMPILE = True
CPU_COMPILE_FROM = 2 ** 16


class Emit(torch.autograd.Function):
    """Emit: o = theta where s is true, else 0. Backward takes s as a function of h and theta, by a surrogate derivative.

    s          bool, which neurons fire: h >= threshold. h, threshold and the result o have its shape
    surrogate  "trsg": s is taken as a function of r = h / theta, with ds/dr = 1 in the window |r - 1| <= 1/2, else 0
               "absolute", the naive form: as a function of h - theta, with slope 1 in the window |h - theta| <= 1/2
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
            r = h * (1 / threshold)                              # divisions are slow: compiled, this one serves all steps
            window = (r - 1).abs() <= 0.5
            do_dh = window                                       # = theta ds/dr dr/dh = theta window / theta
            do_dthreshold = s - r * window                       # = s + theta ds/dr dr/dtheta = s - theta window h / theta^2
        else:
            window = (h - threshold).abs() <= 0.5
            do_dh = threshold * window                           # theta stays: through the reset dv/dh = 1 - theta there
            do_dthreshold = s - threshold * window
        return None, gradient * do_dh, gradient * do_dthreshold, None


def lif(x, v_init, threshold, decay, surrogate="trsg"):
    """The neuron: integrate the current x over T steps, fire, and reset. Its only definition, for every use and device.

    x          [T, ...]   input current, floating point
    v_init     membrane potential before the first step, 0-d or of the shape x[0] (same unit as x and threshold)
    threshold  theta > 0, 0-d or of a shape that expands to x[0]'s
    decay      k = 1 / tau in (0, 1), likewise
    surrogate  "trsg" emits theta s;  "absolute", the naive form kept for comparison, emits s

    Returns (spikes, a list of T tensors [...] in x's dtype, v [...] the potential after the last step, fired [...] bool,
    True where the neuron fired at least once). Potentials are float32 at least. Differentiable in x, v_init, threshold
    and decay, through the reset as well. arXiv:2511.08708.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)          # bf16 currents still integrate in float32
    # One threshold and one decay per neuron (a view, no memory): their gradients then add up neuron by neuron, and
    # are summed over the layer once at the end instead of once per use.
    threshold, decay = (p.to(dtype).expand(x.shape[1:]) for p in (threshold, decay))
    v, fired, spikes = v_init.to(dtype), x.new_zeros(x.shape[1:], dtype=torch.bool), []
    for x_t in x.unbind(0):
        h = v + decay * (x_t.to(dtype) - v)                      # charge  h[t] = v[t-1] + k (x[t] - v[t-1])
        s = h >= threshold                                       # fire    s[t] = 1 if h[t] >= theta else 0
        o = Emit.apply(s, h, threshold, surrogate)               # emit    o[t] = theta s[t]
        v = h - o                                                # reset   v[t] = h[t] - theta s[t]
        spikes.append((o if surrogate == "trsg" else o / threshold).to(x.dtype))       # the naive form emits s
        fired = fired | s
    return spikes, v, fired


def _lif_and_mean(x, v_init, threshold, decay, surrogate, mp_init, distributed):
    """What one layer computes for x [T, rows, columns]: its spikes, and m, the mean of v[T] over the neurons that MP-Init
    averages (v_init if there are none, or any potential is not finite; None if it is off).

    All sums over the layer go row by row first, which a GPU's kernel does in passing."""
    threshold, decay = (p.expand(x.shape[1], 1) for p in (threshold, decay))         # so that their gradients' sums do, too
    # Checkpointing: backward runs the loop again from x, so that nothing else is kept for it. Reading x once more
    # is far cheaper than writing and reading every step's potential. The spikes are stacked outside of it: whatever
    # they go to keeps them anyway, and backward need not compute them again.
    spikes, v, fired = checkpoint(lif, x, v_init, threshold, decay, surrogate, use_reentrant=False,
                                  preserve_rng_state=False)
    spikes = torch.stack(spikes)
    if mp_init == "off":
        return spikes, None
    v = v.detach()
    chosen = fired.to(v.dtype) if mp_init == "active" else torch.ones_like(v)
    total_and_count = torch.stack([(v * chosen).sum(1), chosen.sum(1)]).sum(1)
    if distributed:                                              # every process sees a part of the batch: sum first,
        dist.all_reduce(total_and_count)                         # divide after, and N processes equal one
    mean = total_and_count[0] / total_and_count[1]               # NaN if none fired or an input was NaN
    return spikes, torch.where(mean.isfinite(), mean, v_init)


def compile_options():
    """Options for torch.compile with which a GPU runs the loop as one kernel forward and one backward."""
    options = {"realize_acc_reads_threshold": 32,                # BatchNorm before it is computed there too, never stored
               "max_pointwise_cat_inputs": 0,                    # each step's result is written where it belongs, not
               "max_complex_pointwise_cat_inputs": 0}            # gathered by a second kernel (torch 2.13 and later)
    return {name: value for name, value in options.items() if name in torch._inductor.list_options()}


@functools.cache
def _compiled():
    # dynamic=True: the number of neurons is an argument of the kernel, so that every layer and batch size share it.
    return torch.compile(_lif_and_mean, dynamic=True, options=compile_options())


@functools.cache
def _many_compilations(thread):
    """Each T, dtype and mode needs a kernel of its own: easily more than the 8 after which torch stops compiling.
    One patch a thread: before torch 2.14 threads cannot share one, and from then on each that is made stays in memory."""
    return torch._dynamo.config.patch(recompile_limit=64)


class _NotAView(torch.autograd.Function):
    """The identity, hiding that x is a view: torch.compile would compile anew for every kind of tensor it is a view of."""

    @staticmethod
    def forward(ctx, x):
        return x.detach()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def _run(x, *args):
    """_lif_and_mean(x, *args): fused where that pays and is possible, else as it stands."""
    global COMPILE
    pays = x.device.type != "cpu" or x.numel() >= CPU_COMPILE_FROM
    real = type(x) is torch.Tensor and not x.is_meta             # a kernel would crash on a FakeTensor, for example
    if COMPILE and pays and real and not torch.compiler.is_compiling():              # in a compiled network it fuses anyway
        try:
            with _many_compilations(threading.get_ident()):
                return _compiled()(_NotAView.apply(x), *args)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ImportError, OSError) as error:    # no C++ compiler or no Triton, for example
            result = _lif_and_mean(x, *args)                     # an error that is not the compiler's comes again here
            COMPILE = False
            reason = str(error).strip().partition("\n")[0]
            warnings.warn("neuron.py: torch.compile does not work here, so the time loop runs operation by operation "
                          f"(slower, equal up to rounding): {type(error).__name__}: {reason}")
            return result
    return _lif_and_mean(x, *args)


class TrLIF(nn.Module):
    """A layer of leaky integrate-and-fire neurons with MP-Init and TrSG, its threshold and leak shared by the layer.

    threshold  initial theta > 0, in the unit of the input current (which BatchNorm brings to unit variance)
    tau        initial membrane time constant > 1, in time steps; the decay is k = 1 / tau
    mp_init    "active": start at the running mean over neurons that fired (the paper); "all": over every neuron;
               "off": v_init stays as it is, at 0
    surrogate  "trsg", or "absolute" for the naive form
    momentum   beta, the weight of the newest batch in the running mean
    learnable  whether threshold and tau are trained
    check      look for NaN and infinity in every input (costs a pass over it and waits for the device)

    forward: current [T, B, ...] -> spikes of the same shape, dtype and memory format, with values 0 or theta ("trsg"),
    or 0 or 1 ("absolute"). Raises TypeError for a current that is not floating point, ValueError for one without T
    and B, with T = 0, or not finite (check). arXiv:2511.08708.

    In training every forward replaces v_init. So: no training inside of torch.utils.checkpoint, which would run it a second
    time from another start and get wrong gradients (it keeps only its input for the backward pass anyway); none with
    nn.DataParallel or in CUDA graphs captured by hand, which lose the new value. With torch.distributed the mean is that
    of all processes of the default group, each of which has to make the call.
    """

    def __init__(self, threshold=1.0, tau=2.0, mp_init="active", surrogate="trsg", momentum=0.1, learnable=True,
                 check=False):
        super().__init__()
        if not 0 < threshold < math.inf:
            raise ValueError(f"threshold must be above 0 and finite, not {threshold}")
        if not 1 < tau < math.inf:
            raise ValueError(f"tau must be above 1 and finite (1/tau is the decay per step), not {tau}")
        if mp_init not in ("active", "all", "off"):
            raise ValueError(f"mp_init must be 'active', 'all' or 'off', not {mp_init!r}")
        if surrogate not in ("trsg", "absolute"):
            raise ValueError(f"surrogate must be 'trsg' or 'absolute', not {surrogate!r}")
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be from 0 to 1, not {momentum}")
        # Trained in raw form, so that no gradient step can leave the legal range: softplus > 0, 0 < sigmoid < 1.
        inverse_softplus = threshold + math.log(-math.expm1(-threshold))
        self.raw_threshold = nn.Parameter(torch.tensor(float(inverse_softplus)), requires_grad=learnable)
        self.raw_decay = nn.Parameter(torch.tensor(-math.log(tau - 1)), requires_grad=learnable)
        self.register_buffer("v_init", torch.zeros(()))          # mu; a buffer, so that checkpoints carry it
        self.mp_init, self.surrogate, self.momentum, self.check = mp_init, surrogate, momentum, check

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
            raise TypeError(f"TrLIF needs a floating-point current, not {x.dtype}: convert it with .float()")
        if x.dim() < 2 or x.shape[0] == 0:
            raise ValueError(f"TrLIF needs a current of shape [T, B, ...] with T >= 1, not {list(x.shape)}")
        if self.check and not x.isfinite().all():
            raise ValueError("TrLIF's input current holds NaN or infinity")

        # Neurons do not interact, so the loop sees them as [T, rows, columns], listed as they lie in memory: contiguous
        # and channels_last inputs are both views, and all shapes share compiled kernels.
        order = sorted(range(1, x.dim()), key=x.stride, reverse=True)
        listed = x.permute(0, *order)
        if not listed[0].is_contiguous():
            order, listed = range(1, x.dim()), x.contiguous()
        neurons = x[0].numel()                                   # a CPU sums best in one row, a GPU needs many at a time
        columns = max(neurons, 1) if x.device.type == "cpu" else math.gcd(neurons, 2048)
        spikes, mean = _run(listed.reshape(len(x), -1, columns), self.v_init, self.threshold, self.decay, self.surrogate,
                            self.mp_init if self.training else "off", dist.is_available() and dist.is_initialized())
        if mean is not None:                                     # MP-Init  mu <- (1 - beta) mu + beta m
            # A new tensor, not lerp_ in place: the backward pass still to come runs the loop again from the old value
            # (that of a compiled network would read the new one even from a copy made before).
            with torch.inference_mode(False):                    # else nobody could train from this v_init, or load into it
                self.v_init = self.v_init.to(mean.dtype).lerp(mean, self.momentum).to(self.v_init.dtype)
        return spikes.reshape(listed.shape).permute(0, *(1 + order.index(d) for d in range(1, x.dim())))

    def extra_repr(self):
        values = {"threshold": self.threshold, "tau": self.tau, "v_init": self.v_init}
        shown = [f"{name}={value.item():.4g}" for name, value in values.items() if not value.is_meta]
        return ", ".join([*shown, f"mp_init={self.mp_init!r}", f"surrogate={self.surrogate!r}"])


def _benchmark(timesteps=4):
    """Print forward + backward time of one layer, plain and fused, beside the time its memory traffic takes."""
    from torch.utils.benchmark import Timer                      # warms up, and waits for the GPU
    global COMPILE
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, threads = torch.bfloat16 if device == "cuda" else torch.float32, torch.get_num_threads()
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {threads} threads"
    print(f"{name}, torch {torch.__version__}, {dtype}, T = {timesteps}; milliseconds, medians of a second each")
    print("neurons     plain loop     fused     floor (5 passes)     fused / floor     plain / fused")

    def time_of(function):
        return 1e3 * Timer("f()", globals={"f": function}, num_threads=threads).blocked_autorange(min_run_time=1).median

    for neurons in (2 ** 18, 2 ** 21, 2 ** 24 if device == "cuda" else 2 ** 22):
        x = torch.randn(timesteps, neurons, device=device, dtype=dtype, requires_grad=True)
        gradient, copy, layer = torch.randn_like(x), torch.empty_like(x), TrLIF().to(device)

        def step():
            x.grad = None
            layer(x).backward(gradient)
        # A copy is 2 passes; no layer can do with fewer than 5: read x, write spikes; read x and gradient, write gradient.
        floor = 2.5 * time_of(lambda: copy.copy_(gradient))
        COMPILE = False
        plain = time_of(step)
        COMPILE = True
        fused = time_of(step)
        print(f"{neurons:8d}  {plain:12.2f}  {fused:8.2f}  {floor:14.2f}  {fused / floor:15.2f}x  {plain / fused:15.1f}x")
    if device == "cpu":
        print("Many times the floor at large sizes? Under Linux large tensors may get their memory anew each time, page by page;\n"
              "MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8589934592 python neuron.py keeps it.")


if __name__ == "__main__":
    _benchmark()
