"""Tests, a section per component. Run: python -m pytest -q test_neuron.py

They compare with something independent: a NumPy oracle whose backward pass is derived by hand, a lemma of the paper, a
second process, an uninterrupted run.
"""
import concurrent.futures
import contextvars
import functools
import hashlib
import http.server
import math
import multiprocessing
import os
import pathlib
import pickle
import platform
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import zipfile

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image

import data
import eval as evaluation
import models
import neuron
import train
from neuron import TrLIF

HERE = pathlib.Path(__file__).resolve().parent
SMALL = ["--dataset", "shapes", "--arch", "resnet19", "--width", "4", "--timesteps", "2", "--no-compile"]


def python(*arguments, cwd=HERE, code=0, seconds=600, **environment):
    """Run a Python program in a process of its own; returns its output. code: the exit status it must have."""
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=seconds,
                          env={**os.environ, **environment})
    assert done.returncode == code, f"exit {done.returncode}, not {code}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout if code == 0 else done.stderr


def printed(capsys, program, *arguments):
    """What train or evaluation (the modules) print when called in this process, which saves importing everything anew."""
    capsys.readouterr()
    program.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """Nothing is compiled where a test does not ask for it; a training run called in this process leaves no signal handlers."""
    monkeypatch.setattr(neuron, "COMPILE", False)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def fused(monkeypatch):
    """Fuse however small the input is, and fail where fusing is not possible instead of falling back."""
    monkeypatch.setattr(neuron, "COMPILE", True)
    monkeypatch.setattr(neuron, "CPU_COMPILE_FROM", 0)
    yield
    assert neuron.COMPILE, "compiling failed and the layer fell back to the plain loop"


# ---- neuron ------------------------------------------------------------------------------------------------------------

def oracle(x, g, v, theta, k, surrogate):
    """The neuron in NumPy: spikes, v[T], fired, and the gradients of sum(g * spikes) in x, theta and k by hand."""
    T = len(x)
    h, s, w, before = (np.zeros_like(x) for _ in range(4))
    v = np.broadcast_to(np.float64(v), x[0].shape).copy()
    for t in range(T):
        before[t] = v
        h[t] = v + k * (x[t] - v)
        s[t] = h[t] >= theta
        w[t] = abs(h[t] / theta - 1) <= 0.5 if surrogate == "trsg" else abs(h[t] - theta) <= 0.5
        v = h[t] - theta * s[t]
    gx, gtheta, gk, gv = np.zeros_like(x), 0.0, 0.0, np.zeros_like(v)
    for t in reversed(range(T)):                                 # gv = dL/dv[t], arriving from the next step
        if surrogate == "trsg":                                  # o = theta s:  do/dh = w,  do/dtheta = s - r w
            go = g[t] - gv                                       # v[t] = h - o
            gh = gv + go * w[t]
            gtheta += (go * (s[t] - h[t] / theta * w[t])).sum()
        else:                                                    # s:  ds/dh = w,  ds/dtheta = -w;  v[t] = h - theta s
            gs = g[t] - theta * gv
            gh = gv + gs * w[t]
            gtheta += (-gv * s[t] - gs * w[t]).sum()
        gx[t], gk, gv = k * gh, gk + (gh * (x[t] - before[t])).sum(), (1 - k) * gh
    return (theta * s if surrogate == "trsg" else s), v, s.any(0), gx, gtheta, gk


def check_against_oracle(T, theta, tau, surrogate, dtype, tolerance, mp_init="active", shape=(3, 2, 4, 5)):
    torch.manual_seed(T)
    layer = TrLIF(theta, tau, surrogate=surrogate, mp_init=mp_init).to(torch.float64 if dtype == torch.float64 else torch.float32)
    mu = 0.0
    for _ in range(3):                                           # three batches, so that v_init matters
        x = (2 * theta * torch.randn(T, *shape)).to(dtype).requires_grad_()
        g = torch.randn(T, *shape).to(dtype)
        layer.zero_grad()
        spikes = layer(x)
        spikes.backward(g)
        th, k = layer.threshold.item(), layer.decay.item()
        o, v, fired, gx, gth, gk = oracle(x.detach().double().numpy(), g.double().numpy(), mu, th, k, surrogate)
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())
        assert spikes.dtype == dtype and spikes.shape == x.shape
        close(spikes.detach().double().numpy(), o)
        close(x.grad.double().numpy(), gx)
        close(layer.raw_threshold.grad.item(), gth * torch.sigmoid(layer.raw_threshold).item())
        close(layer.raw_decay.grad.item(), gk * k * (1 - k))
        chosen = fired if mp_init == "active" else np.ones_like(fired)
        if mp_init != "off" and chosen.any():
            mu = 0.9 * mu + 0.1 * v[chosen].mean()
        close(layer.v_init.item(), np.float64(mu))
        mu = layer.v_init.item()


@pytest.mark.parametrize("surrogate", ["trsg", "absolute"])
@pytest.mark.parametrize("tau", [1.25, 2, 5])
@pytest.mark.parametrize("theta", [0.25, 1, 2.5])
@pytest.mark.parametrize("T", [1, 2, 4, 6])
def test_outputs_and_gradients_equal_the_oracle(T, theta, tau, surrogate):
    check_against_oracle(T, theta, tau, surrogate, torch.float64, 1e-12)


@pytest.mark.parametrize("mp_init", ["all", "off"])
def test_other_initialisations_equal_the_oracle(mp_init):
    check_against_oracle(4, 1, 2, "trsg", torch.float64, 1e-12, mp_init)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("surrogate", ["trsg", "absolute"])
def test_fused_equals_the_oracle(fused, surrogate, dtype, tolerance):
    check_against_oracle(4, 1, 2, surrogate, dtype, tolerance, shape=(16, 8, 9, 9))


@pytest.mark.parametrize("mode", ["plain", "fused"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("theta", [0.3, 1.0, 2.7])
def test_a_potential_exactly_at_the_threshold_spikes(request, mode, training, theta):
    request.getfixturevalue(mode)
    layer = TrLIF(theta, tau=2).train(training)
    th = layer.threshold.detach()
    below = torch.nextafter(th, torch.tensor(0.0))
    spikes = layer(torch.stack([2 * th, 2 * below]).expand(1, 2))    # k = 1/2: h = x / 2, exactly theta or just below
    assert torch.equal(spikes, torch.stack([th, torch.tensor(0.0)])[None])


@pytest.mark.parametrize("c", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("surrogate", ["trsg", "absolute"])
def test_scaling_current_and_threshold_leaves_trsg_gradients_as_they_were(surrogate, c):
    def gradients(scale):
        torch.manual_seed(0)
        x = (scale * 2 * torch.randn(4, 50, dtype=torch.float64)).requires_grad_()
        theta = torch.tensor(1.3 * scale, dtype=torch.float64, requires_grad=True)
        v_init, k = torch.tensor(0.2 * scale, dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64)
        spikes = torch.stack(neuron.lif(x, v_init, theta, k, surrogate)[0])
        spikes.backward(torch.randn(4, 50, dtype=torch.float64))
        return spikes.detach(), x.grad, theta.grad
    (o1, gx1, gth1), (oc, gxc, gthc) = gradients(1.0), gradients(c)
    if surrogate == "trsg":
        torch.testing.assert_close(oc, c * o1, rtol=1e-9, atol=0)
        torch.testing.assert_close((gxc, gthc), (gx1, gth1), rtol=1e-9, atol=1e-12)
    elif c != 1:                                                 # the naive form: vanishing, or other, gradients
        assert (gxc - gx1).norm() > 0.3 * gx1.norm() and abs(gthc - gth1) > 0.3 * abs(gth1)


@pytest.mark.parametrize("s", [0.5, 1.0])
@pytest.mark.parametrize("m", [0.5, 1.0])
def test_mp_init_halves_the_shift_between_early_and_late_steps(m, s):
    def shift(v_init):
        x = m + s * torch.randn(50, 20000, generator=torch.Generator().manual_seed(1))
        theta, k = torch.tensor(1.0), torch.tensor(0.5)
        first, last = (neuron.lif(x[:n], v_init, theta, k)[1] for n in (1, 50))
        return (first.sort()[0] - last.sort()[0]).abs().mean()   # 1-Wasserstein distance of two equal-sized samples
    torch.manual_seed(0)
    layer = TrLIF()
    for _ in range(60):                                          # 0.9 ** 60: the start is forgotten
        layer(m + s * torch.randn(4, 5000))
    assert shift(layer.v_init) < 0.5 * shift(torch.tensor(0.0))


def test_v_init_is_saved_frozen_in_evaluation_and_left_alone_by_silence():
    layer = TrLIF()
    layer(torch.full((3, 5), -1.0))
    assert layer.v_init == 0 and "v_init" in layer.state_dict()  # nothing fired
    layer(torch.randn(3, 500))
    learnt = layer.v_init.clone()
    assert learnt != 0
    layer.eval()(torch.randn(3, 500))
    assert torch.equal(layer.v_init, learnt)
    restored = TrLIF()
    restored.load_state_dict(layer.state_dict())
    assert torch.equal(restored.v_init, learnt)


def test_fixed_neurons_do_not_learn():
    layer = TrLIF(learnable=False)
    x = torch.randn(2, 100, requires_grad=True)
    layer(x).sum().backward()
    assert layer.raw_threshold.grad is None and layer.raw_decay.grad is None and x.grad.abs().sum() > 0


@pytest.mark.parametrize("theta, tau", [(1e-3, 1.001), (1.0, 2.0), (50.0, 1000.0)])
def test_threshold_and_tau_start_where_asked(theta, tau):
    layer = TrLIF(theta, tau).double()
    assert layer.threshold.item() == pytest.approx(theta, rel=1e-5) and layer.tau.item() == pytest.approx(tau, rel=1e-3)
    of_numpy = TrLIF(np.float64(theta), np.float64(tau))         # numbers of NumPy make no layer of float64
    assert {v.dtype for v in of_numpy.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("mode", ["plain", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_format_is_kept_and_does_not_matter(request, mode, dtype):
    request.getfixturevalue(mode)
    x = torch.randn(3, 2, 4, 5, 6).to(dtype)
    nhwc = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (3, 2))
    odd = x.transpose(0, 1).contiguous().transpose(0, 1)         # batch before time in memory
    results = []
    for variant in (x, nhwc, odd):
        variant = variant.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        layer = TrLIF()
        spikes = layer(variant)
        spikes.sum().backward()
        results.append((spikes, variant.grad, layer.v_init.clone()))
    assert results[0][0].is_contiguous()
    assert results[1][0].flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    for spikes, gradient, mu in results[1:]:
        assert torch.equal(spikes, results[0][0]) and torch.equal(gradient, results[0][1])
        torch.testing.assert_close(mu, results[0][2], rtol=1e-5, atol=1e-7)


def test_backward_keeps_the_input_only():
    x, kept = torch.randn(8, 4, 250, requires_grad=True), []
    for run in (neuron._lif_and_mean, torch.compile(neuron._lif_and_mean)):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            spikes, _ = run(x, torch.zeros(()), torch.ones((), requires_grad=True), torch.full((), 0.5), "trsg", "active", False)
        assert sum(t.numel() for t in kept if t.data_ptr() != x.data_ptr()) < 100, [t.shape for t in kept]
        spikes.sum().backward()


@pytest.mark.parametrize("surrogate", ["trsg", "absolute"])
def test_sums_over_rows_are_sums_over_the_layer(surrogate):
    """A GPU adds up row by row, a CPU all neurons at once."""
    torch.manual_seed(0)
    x, gradient, results = torch.randn(3, 96).double(), torch.randn(3, 96).double(), []
    plain, compiled = neuron._lif_and_mean, neuron._compiled()
    for run, shape in ((plain, (3, 1, 96)), (plain, (3, 8, 12)), (plain, (3, 96, 1)), (compiled, (3, 8, 12))):
        current, theta, k = (v.clone().requires_grad_() for v in (x.view(shape), torch.tensor(0.7).double(), torch.tensor(0.4).double()))
        spikes, mean = run(current, torch.tensor(0.1).double(), theta, k, surrogate, "active", False)
        spikes.backward(gradient.view(shape))
        results.append((spikes.detach().flatten(), mean, current.grad.flatten(), theta.grad, k.grad))
    assert results[0][1] != 0.1 and results[0][3] != 0
    for result in results[1:]:
        for a, b in zip(result, results[0]):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.fixture
def compilations(fused):
    """Forget what was compiled; how often something was compiled since."""
    torch._dynamo.reset()
    neuron._compiled.cache_clear()
    torch._dynamo.utils.counters.clear()
    return lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("arch", ["resnet19", "spikformer"])     # 17 layers of 5 shapes; 33 layers whose currents are views of many kinds
def test_few_compilations_serve_a_whole_training(compilations, arch):
    model = models.build(arch, 10, timesteps=2, width=4)
    for batch in (8, 8, 5, 3):                                   # batches of 3 sizes, both modes
        model.train()(torch.randn(batch, 3, 32, 32)).sum().backward()
        with torch.no_grad():
            model.eval()(torch.randn(batch, 3, 32, 32))
    assert compilations() <= 4


def test_many_time_steps_in_one_process_all_run_fused(compilations):
    for T in range(2, 12):
        TrLIF()(torch.randn(T, 3, 5))
    assert compilations() == 10                                  # torch alone would stop compiling at 8


def test_threads_run_fused_side_by_side_and_calls_leave_nothing_behind(fused):
    x, layer = torch.randn(4, 3, 50), TrLIF().eval()
    expected, start = layer(x), threading.Barrier(4)

    def work(_):
        layer(x)
        before = len(contextvars.copy_context())                 # where torch keeps what a patch of its settings replaced
        start.wait()
        same = [torch.equal(layer(x), expected) for _ in range(100)]
        return all(same), len(contextvars.copy_context()) - before
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [(True, 0)] * 4


def test_falls_back_to_the_plain_loop_with_one_warning(monkeypatch):
    def broken():
        def call(*_):
            raise RuntimeError("no compiler here\nand much more")
        return call
    monkeypatch.setattr(neuron, "COMPILE", True)
    monkeypatch.setattr(neuron, "CPU_COMPILE_FROM", 0)
    monkeypatch.setattr(neuron, "_compiled", broken)
    layer, x = TrLIF(), torch.randn(3, 7)
    with pytest.warns(UserWarning, match="no compiler here$") as caught:
        first = layer.eval()(x)
        second = layer.eval()(x)
    assert len(caught) == 1 and torch.equal(first, second) and torch.equal(first, torch.stack(neuron.lif(x, *map(torch.tensor, (0., 1., .5)))[0]))


@pytest.mark.parametrize("mode", ["plain", "fused"])
def test_a_layer_that_learned_its_start_in_inference_mode_can_be_trained_and_loaded(mode, request):
    request.getfixturevalue(mode)
    layer, x = TrLIF(), torch.randn(3, 4, 50)
    with torch.inference_mode():
        layer(x)
    start = layer.v_init.clone()
    assert start != 0
    layer(x.requires_grad_()).sum().backward()
    assert layer.v_init != start and layer.raw_threshold.grad != 0
    layer.load_state_dict(TrLIF().state_dict())
    assert layer.v_init == 0


def test_fake_and_meta_tensors_have_shapes_but_no_values(fused):
    assert TrLIF()(torch.randn(3, 4, 50)).isfinite().all()
    with torch._subclasses.fake_tensor.FakeTensorMode():         # a fused kernel would read memory that is not there
        layer = TrLIF()
        assert layer(torch.randn(3, 4, 50)).shape == (3, 4, 50)
    layer = TrLIF().to("meta")
    assert layer(torch.randn(3, 4, 50, device="meta")).shape == (3, 4, 50) and repr(layer) == "TrLIF(mp_init='active', surrogate='trsg')"


def test_a_batch_that_is_not_finite_leaves_the_start_alone():
    layer, x = TrLIF(), torch.full((2, 5), 3.0)
    layer(x)
    start = layer.v_init
    for bad in (math.inf, -math.inf, math.nan):
        layer(torch.cat([x, torch.full((2, 1), bad)], 1))
        assert torch.equal(layer.v_init, start) and start > 0


def test_half_precision_layers_average_in_float32():
    torch.manual_seed(0)
    full, half, x = TrLIF(), TrLIF().half(), torch.randn(2, 64, 4096) + 1
    full(x), half(x.half())
    assert half.v_init.dtype == torch.float16 and half.v_init.item() == pytest.approx(full.v_init.item(), rel=1e-2)


def test_errors_that_are_not_the_compilers_leave_the_fused_loop_on(fused):
    torch.manual_seed(0)
    layer, x = TrLIF().eval(), torch.randn(3, 100, requires_grad=True)
    layer.v_init = torch.zeros((), device="meta")
    with pytest.raises(RuntimeError, match="meta"):
        layer(x)
    layer.v_init = torch.tensor(0.2)
    gradients = []
    for run in (layer, lambda x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)):   # ends its second run by an exception
        gradients.append(torch.autograd.grad(run(x).square().sum(), x)[0])
    assert torch.equal(*gradients) and gradients[0].any() and neuron.COMPILE


@pytest.mark.parametrize("make, message", [
    (lambda: TrLIF(threshold=0), "threshold must be above 0"),
    (lambda: TrLIF(threshold=float("nan")), "threshold must be above 0"),
    (lambda: TrLIF(tau=1), "tau must be above 1"),
    (lambda: TrLIF(surrogate="sigmoid"), "surrogate must be 'trsg' or 'absolute', not 'sigmoid'"),
    (lambda: TrLIF(mp_init="mean"), "mp_init must be"),
    (lambda: TrLIF(momentum=2), "momentum must be"),
    (lambda: TrLIF()(torch.ones(2, 3, dtype=torch.int64)), "floating-point"),
    (lambda: TrLIF()(torch.ones(3)), r"\[T, B, ...\]"),
    (lambda: TrLIF()(torch.ones(0, 3)), "T >= 1"),
    (lambda: TrLIF(check=True)(torch.tensor([[1.0, float("nan")]])), "NaN or infinity")])
def test_bad_use_of_the_layer_is_explained_in_a_line(make, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_the_file_works_alone(tmp_path):
    shutil.copy(HERE / "neuron.py", tmp_path)
    assert "(4, 2, 3)" in python("-c", "import torch; from neuron import TrLIF; print(tuple(TrLIF()(torch.randn(4, 2, 3)).shape))",
                                 cwd=tmp_path)


# ---- models ------------------------------------------------------------------------------------------------------------

def neurons(model):
    return [m for m in model.modules() if isinstance(m, TrLIF)]


@pytest.mark.parametrize("arch, classes, parameters, layers", [
    ("resnet19", 100, 12_548_294, 17), ("resnet19", 10, 12_502_124, 17), ("resnet18", 1000, 11_689_546, 17),
    ("resnet34", 1000, 21_797_738, 33), ("sew_resnet18", 1000, 11_689_546 + 6, 20),
    ("sew_resnet34", 1000, 21_797_738 + 6, 36), ("spikformer", 10, 9_324_730 + 2 * 33, 33)])
def test_parameters_and_neurons(arch, classes, parameters, layers):
    model = models.build(arch, classes, timesteps=1)
    assert sum(p.numel() for p in model.parameters()) == parameters and len(neurons(model)) == layers


@pytest.mark.parametrize("arch", models.ARCHS)
@pytest.mark.parametrize("T, size", [(1, 28), (2, 32), (4, 48), (1, 224)])
def test_networks_run_forward_and_backward(arch, T, size):
    width = 4
    static = models.build(arch, 7, T, width=width)
    logits = static(torch.randn(2, 3, size, size))
    assert logits.shape == (T, 2, 7)
    logits.mean(0).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in static.parameters())
    events = models.build(arch, 7, 1, in_channels=2, width=width)
    assert events(torch.rand(2, T, 2, size, size)).shape == (T, 2, 7)


@pytest.mark.parametrize("arch", ["resnet19", "sew_resnet18", "spikformer"])
def test_a_static_image_equals_the_same_frame_at_every_step(arch):
    torch.manual_seed(0)
    model = models.build(arch, 5, 3, width=4).double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(model(x), model(x[:, None].expand(-1, 3, -1, -1, -1)), rtol=1e-12, atol=1e-12)


def test_attention_in_either_order_is_the_same():
    torch.manual_seed(0)
    layer = models.SpikingSelfAttention(24, 12, {}).double().eval()
    for m in layer.modules():
        if isinstance(m, nn.BatchNorm1d):
            nn.init.constant_(m.weight, 4.0)
    x, seen = torch.randint(0, 2, (2, 9, 24)).double(), []
    layer.lif.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    layer(x, 1)
    q, k, v = (part(x, 1).unflatten(2, (12, 2)).transpose(1, 2) for part in (layer.q, layer.k, layer.v))
    product = ((q @ k.transpose(2, 3)) * 0.125 @ v).transpose(1, 2).flatten(2)
    assert product.abs().sum() > 0
    torch.testing.assert_close(seen[0][0], product)


def test_compiling_the_network_changes_rounding_only():
    """20 training steps in float64, the whole network fused or not: the same losses, and MP-Init updated alike."""
    def losses(fuse):
        torch.manual_seed(0)
        neuron.COMPILE = fuse
        model = models.ResNet([(8, 1, 1), (16, 1, 2)], 10, 2, 3, 8, {}).double()    # small: compiling takes its time
        if fuse:
            models.compile_model(model)
        optimizer, out = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), []
        for i in range(20):
            generator = torch.Generator().manual_seed(i)
            x = torch.randn(8, 3, 16, 16, generator=generator, dtype=torch.float64)
            loss = F.cross_entropy(model(x).mean(0), torch.arange(8))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            out.append(loss.item())
        return out, [n.v_init.item() for n in neurons(model)]
    try:
        (a, mu_a), (b, mu_b) = losses(False), losses(True)
    finally:
        neuron.COMPILE = True
    assert a[-1] < a[0]
    np.testing.assert_allclose(a, b, rtol=1e-6)
    np.testing.assert_allclose(mu_a, mu_b, rtol=1e-6)


@pytest.mark.parametrize("arch", ["resnet19", "sew_resnet18"])
@pytest.mark.parametrize("surrogate", ["trsg", "absolute"])
@pytest.mark.parametrize("c", [0.25, 4.0])
def test_scaled_currents_make_the_threshold_a_unit(arch, surrogate, c):
    """The lemma through a whole network: from threshold c and BatchNorms at c, TrSG computes what it does from 1."""
    def run(threshold):
        torch.manual_seed(0)
        model = models.build(arch, 10, 3, width=4, threshold=threshold, surrogate=surrogate).double()
        models.scale_currents(model, threshold)
        if surrogate == "trsg":                                  # the head's input is theta s
            model.head.weight.data /= threshold
        spikes = []
        for module in model.modules():
            if isinstance(module, TrLIF):
                nn.init.constant_(module.raw_threshold, math.log(math.expm1(threshold)))      # exact in float64
                module.register_forward_hook(lambda m, i, o: spikes.append(o != 0))
            elif isinstance(module, nn.BatchNorm2d):
                module.eps = 1e-14                               # the only thing that knows a unit
        F.cross_entropy(model(torch.randn(8, 3, 16, 16).double()).mean(0), torch.arange(8)).backward()
        return spikes, [m.weight.grad for m in model.modules() if isinstance(m, nn.Conv2d)]
    (spikes, gradients), (spikes_c, gradients_c) = run(1.0), run(c)
    if surrogate == "trsg":
        assert len(spikes) >= 17 and all((a == b).all() for a, b in zip(spikes, spikes_c))
        for a, b in zip(gradients, gradients_c):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * a.abs().max())
    else:                                                        # the fixed window does notice
        assert max(abs(math.log(b.norm() / a.norm())) for a, b in zip(gradients, gradients_c)) > 1


@pytest.mark.parametrize("arch", ["resnet19", "spikformer"])
def test_neurons_under_autocast_equal_the_oracle(arch):
    """Convolutions and products in bfloat16, as on a GPU: what arrives at each neuron layer is integrated exactly all the same."""
    torch.manual_seed(0)
    model, seen, dtypes = models.build(arch, 10, 3, width=8, threshold=0.37, tau=1.7), {}, set()

    def look(layer, inputs, spikes):
        dtypes.add(inputs[0].dtype)
        seen[layer] = [inputs[0], spikes.detach(), None, None]
        inputs[0].register_hook(lambda g: seen[layer].__setitem__(2, g))
        spikes.register_hook(lambda g: seen[layer].__setitem__(3, g))
    for layer in neurons(model):
        layer.register_forward_hook(look)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.randn(4, 3, 32, 32))
    F.cross_entropy(logits.float().mean(0), torch.arange(4)).backward()
    assert dtypes == {torch.bfloat16} and len(seen) == len(neurons(model))
    for layer, (x, spikes, gx, g) in seen.items():
        x, spikes, gx, g = (v.detach().double().numpy() for v in (x, spikes, gx, g))
        expected, _, _, expected_gx, _, _ = oracle(x, g, 0.0, layer.threshold.item(), layer.decay.item(), "trsg")
        np.testing.assert_allclose(spikes, expected, rtol=2 ** -8)
        np.testing.assert_allclose(gx, expected_gx, rtol=2e-2, atol=2e-2 * np.abs(expected_gx).max())
    assert sum(spikes.count_nonzero().item() > 0 for _, spikes, _, _ in seen.values()) > len(seen) / 2


@pytest.mark.parametrize("tau", [1.05, 1.4])
@pytest.mark.parametrize("surrogate, threshold", [("trsg", 1.0), ("trsg", 0.3), ("absolute", 0.5)])
@torch.no_grad()
def test_blocks_near_the_identity_pass_their_input_on(surrogate, threshold, tau):
    torch.manual_seed(0)
    options = dict(surrogate=surrogate, threshold=threshold, tau=tau, mp_init="off")
    model = models.start_near_identity(models.build("resnet34", 10, 8, width=4, **options)).double()
    amplitude = threshold if surrogate == "trsg" else 1.0
    for block in model.blocks:
        assert block.bn2.weight.min() == block.bn2.weight.max() == pytest.approx(0.1 * amplitude)
        b, k = block.bn2.bias[0].item(), 1 / tau                 # after one step as far below theta as above it
        assert threshold - k * b == pytest.approx(k * (b + amplitude) - threshold, rel=1e-5) and b < threshold
        if block.shortcut is None:                               # at weight 0 the block is exactly the identity
            nn.init.zeros_(block.bn2.weight)
            spikes = amplitude * torch.rand(8 * 2, block.conv1.in_channels, 3, 3).round().double()
            torch.testing.assert_close(block(spikes, 8), spikes, rtol=1e-6, atol=0)


@torch.no_grad()
def test_near_identity_keeps_what_34_layers_garble():
    def kept(near):
        """Correlation of the last spikes of images and of the same images with a little noise, over images."""
        torch.manual_seed(0)
        model = models.build("resnet34", 10, 2, width=4, tau=1.05)
        model, seen = models.start_near_identity(model) if near else model, []
        model.blocks[-1].register_forward_hook(lambda m, i, o: seen.append(o.unflatten(0, (2, -1)).mean(0)))
        x = torch.randn(32, 3, 32, 32)
        for images in (x, x + 0.1 * torch.randn_like(x)):
            model(images)
        a, b = (s - s.mean(0) for s in seen)
        return (F.cosine_similarity(a.flatten(), b.flatten(), dim=0)).item()
    assert kept(False) < 0.2 and kept(True) > 0.5


@pytest.mark.parametrize("arch, options, message", [
    ("sew_resnet18", {}, "behind the neuron"), ("spikformer", {}, "behind the neuron"), ("resnet18", dict(tau=1.5), "tau below 1.5"),
    ("resnet18", dict(tau=2.0, surrogate="absolute", threshold=0.5), "tau below 2")])
def test_networks_that_cannot_start_near_the_identity(arch, options, message):
    with pytest.raises(ValueError, match=message):
        models.start_near_identity(models.build(arch, 10, 1, width=4, **options))


@pytest.mark.parametrize("arguments, message", [
    (("alexnet", 10, 1), "unknown arch 'alexnet'"), (("resnet19", 0, 1), "num_classes"),
    (("resnet19", 10, 0), "timesteps"), (("spikformer", 10, 1, 3, 6), "multiple of 4")])
def test_networks_that_cannot_be_built(arguments, message):
    with pytest.raises(ValueError, match=message):
        models.build(*arguments)


# ---- data --------------------------------------------------------------------------------------------------------------

def test_shapes_need_more_than_a_linear_classifier():
    (x, y), (x_test, y_test) = ((torch.from_numpy(a).flatten(1).float() / 128 - 1, torch.from_numpy(b).long())
                                for a, b in (data.draw_shapes(4000, 1), data.draw_shapes(1000, 2)))
    torch.manual_seed(0)
    linear = nn.Linear(x.shape[1], 10)
    optimizer = torch.optim.Adam(linear.parameters(), 1e-3)
    for _ in range(20):
        for i in torch.randperm(len(x)).split(100):
            optimizer.zero_grad()
            F.cross_entropy(linear(x[i]), y[i]).backward()
            optimizer.step()
    accuracy = (linear(x_test).argmax(1) == y_test).float().mean()
    assert (linear(x).argmax(1) == y).float().mean() > 0.4       # it did learn what it can
    assert accuracy < 0.6


def test_shapes_of_other_sizes():
    small = data.load("shapes", image_size=16)
    assert small.size == (16, 16) and small.pad == 2
    (a, label_a), (b, label_b) = (data.draw_shapes(100, 2, size) for size in (32, 64))
    assert np.array_equal(label_a, label_b)                      # the same shapes at the same places, drawn finer
    means = b.reshape(100, 32, 2, 32, 2, 3).mean((2, 4))
    assert np.corrcoef(a.ravel(), means.ravel())[0, 1] > 0.95
    with pytest.raises(data.UserError, match="up to 96, not 97"):
        data.load("shapes", image_size=97)


def test_shapes_are_reproducible_and_balanced():
    (a, la), (b, lb), (c, _) = data.draw_shapes(200, 1), data.draw_shapes(200, 1), data.draw_shapes(200, 2)
    assert np.array_equal(a, b) and np.array_equal(la, lb) and not np.array_equal(a, c)
    assert np.bincount(la).tolist() == [20] * 10


def small_set(n=100, n_test=37, pad=4, flip=True, shape=(32, 32, 3)):
    rng = np.random.default_rng(0)
    make = lambda m: (rng.integers(0, 256, (m, *shape), dtype=np.uint8), (np.arange(m) % 10).astype(np.uint8))
    return data.Resident("made", make(n), make(n_test), list("abcdefghij"), [0.0] * 3, [1 / 255] * 3, pad, flip).to("cpu")


def test_augmentation_is_a_shift_and_flip_of_each_image_of_its_own():
    dataset = small_set()
    images, seen = dataset.sets["train"][0].numpy(), set()
    x, y = next(iter(dataset.train(100, seed=3, epoch=0)))
    x = x.permute(0, 2, 3, 1).numpy()
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    crops = {}
    for dy in range(9):
        for dx in range(9):
            for mirror in (False, True):
                part = padded[:, dy:dy + 32, dx:dx + 32]
                part = part[:, :, ::-1] if mirror else part
                for i, image in enumerate(part):
                    crops[np.ascontiguousarray(image).tobytes()] = i, dy, dx, mirror
    sources = []
    for image, label in zip(x, y.tolist()):
        i, *how = crops[image.astype(np.uint8).tobytes()]        # every output is one of the possible crops
        assert label == i % 10
        sources.append(i)
        seen.add(tuple(how))
    assert sorted(sources) == list(range(100)) and len(seen) > 60


def test_frames_of_a_recording_move_together():
    frames = np.zeros((20, 3, 2, 16, 16), np.uint8)
    frames[:, :, :, 8, 8] = np.arange(1, 7, dtype=np.uint8).reshape(3, 2)
    dataset = data.Resident("made", (frames, np.zeros(20)), (frames, np.zeros(20)), ["a"], [0.0] * 2, [1 / 255] * 2, 5).to("cpu")
    x, _ = next(iter(dataset.train(20, 0, 0)))
    assert x.shape == (20, 3, 2, 16, 16)
    places = [{tuple(p) for p in (recording > 0).flatten(0, 1).nonzero()[:, 1:].tolist()} for recording in x]
    assert all(len(p) == 1 for p in places) and len(set(map(tuple, places))) > 5
    assert all(recording.amax((2, 3)).flatten().tolist() == [1, 2, 3, 4, 5, 6] for recording in x)
    x, _ = next(iter(dataset.test(20)))
    assert x[0, :, :, 8, 8].flatten().tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("augment", [False, True])
def test_batches_do_not_depend_on_history_or_on_the_number_of_processes(augment):
    dataset = small_set()
    dataset.augment = augment
    whole = list(dataset.train(20, 1, 2))
    assert len(whole) == 5
    for (xa, ya), (xb, yb) in zip(whole[3:], dataset.train(20, 1, 2, start=3)):
        assert torch.equal(xa, xb) and torch.equal(ya, yb)
    for (x, y), (x0, y0), (x1, y1) in zip(whole, dataset.train(20, 1, 2, 0, 0, 2), dataset.train(20, 1, 2, 0, 1, 2)):
        assert torch.equal(x[::2], x0) and torch.equal(x[1::2], x1) and torch.equal(y[1::2], y1)
    assert not torch.equal(whole[0][0], next(iter(dataset.train(20, 1, 3)))[0])


@pytest.mark.parametrize("world, batch", [(1, 10), (2, 10), (3, 7), (4, 64)])
def test_every_test_image_is_seen_once(world, batch):
    dataset = small_set()
    images, labels = dataset.sets["test"]
    parts = [list(dataset.test(batch, rank, world)) for rank in range(world)]
    assert len({len(p) for p in parts}) == 1 and all(len(y) == batch for p in parts for _, y in p)
    seen = [(x[i].sum().item(), y[i].item()) for p in parts for x, y in p for i in range(batch) if y[i] >= 0]
    assert sorted(seen) == sorted((a.float().sum().item(), b.item()) for a, b in zip(images, labels))


def test_trivial_augment_draws_for_parts_of_the_batch_and_leaves_the_global_generator_alone():
    images = torch.randint(0, 256, (64, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before, plain = torch.get_rng_state(), images.clone()
    a, b, other = (data.trivial_augment(images.clone(), 64, 0, 1, key) for key in ((0, 0), (0, 0), (0, 1)))
    assert torch.equal(before, torch.get_rng_state()) and a.dtype == torch.uint8 and a.shape == images.shape
    assert torch.equal(a, b) and not torch.equal(a, other)
    changed = (a != plain).flatten(1).any(1).view(16, 4)         # four images share an operation; some operations change nothing
    assert 8 <= changed.any(1).sum() <= 16 and torch.equal(images, plain)
    odd = [data.trivial_augment(images[r:21:2].clone(), 21, r, 2, (3,)) for r in (0, 1)]   # 21 images do not divide by 16
    whole = data.trivial_augment(images[:21].clone(), 21, 0, 1, (3,))
    assert torch.equal(whole[0::2], odd[0]) and torch.equal(whole[1::2], odd[1])


def test_cutout_blanks_a_square_to_the_mean():
    dataset = small_set(pad=0, flip=False)
    dataset.cutout = 8
    x, _ = next(iter(dataset.train(100, 0, 0)))
    blank = (x == 0).all(1).flatten(1).sum(1)
    assert blank.max() == 64 and blank.min() >= 16 and blank.float().std() > 0


def image_tree(root, sizes=((40, 50), (64, 64)), n=3, modes=("RGB", "L", "RGBA", "P")):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for c, name in enumerate(("cats", "dogs")):
            (root / split / name).mkdir(parents=True)
            for i in range(n * len(modes)):
                height, width = sizes[i % len(sizes)]
                pixels = rng.integers(0, 80, (height, width, 3)) + 150 * c
                Image.fromarray(pixels.astype(np.uint8)).convert(modes[i % len(modes)]).save(
                    root / split / name / f"{i}.{('png', 'webp')[i % 2 if modes[i % len(modes)] != 'P' else 0]}")
    return root


def test_cifar_is_downloaded_once_and_prepared(tmp_path, monkeypatch):
    """The original's format, from a server of our own: an archive of pickled dicts of flattened planes, with its checksums."""
    rng, folder, sums = np.random.default_rng(0), tmp_path / "served/cifar-100-python", {}
    folder.mkdir(parents=True)
    images, labels = rng.integers(0, 256, (7, 32, 32, 3), dtype=np.uint8), [0, 99, 3, 4, 5, 6, 7]
    for name, content in (("train", {"data": images.transpose(0, 3, 1, 2).reshape(7, -1), "fine_labels": labels}),
                          ("test", {"data": images[:2].transpose(0, 3, 1, 2).reshape(2, -1), "fine_labels": labels[:2]}),
                          ("meta", {"fine_label_names": [str(c) for c in range(100)]})):
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    archive = shutil.make_archive(str(tmp_path / "served/cifar-100-python"), "gztar", folder.parent, folder.name)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder.parent))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    address = f"http://127.0.0.1:{server.server_port}"
    for key, value in dict(url=f"{address}/cifar-100-python.tar.gz", tgz_md5=hashlib.md5(pathlib.Path(archive).read_bytes()).hexdigest(),
                           train_list=[["train", sums["train"]]], test_list=[["test", sums["test"]]],
                           meta={"filename": "meta", "key": "fine_label_names", "md5": sums["meta"]}).items():
        monkeypatch.setattr(torchvision.datasets.CIFAR100, key, value)
    made, original = [], torchvision.datasets.CIFAR100.__init__
    monkeypatch.setattr(torchvision.datasets.CIFAR100, "__init__", lambda self, *a, **k: made.append(k["train"]) or original(self, *a, **k))
    with concurrent.futures.ThreadPoolExecutor() as two:         # both find nothing, one downloads and the other waits for it
        a, b = two.map(lambda _: data.load("cifar100", tmp_path / "data"), range(2))
    assert made == [True, False]
    for dataset in (a, b):
        x, y = next(iter(dataset.test(2)))
        expected = (torch.tensor(images[:2]).permute(0, 3, 1, 2) / 255 - torch.tensor(dataset.mean).view(3, 1, 1)) / torch.tensor(dataset.std).view(3, 1, 1)
        torch.testing.assert_close(x, expected)
        assert y.tolist() == [0, 99] and len(dataset) == 7
    monkeypatch.setattr(torchvision.datasets.CIFAR100, "url", f"{address}/nowhere.tar.gz")
    with pytest.raises(data.UserError, match=r"^cifar100 is not in [^\n]* cannot be downloaded [^\n]*nowhere.tar.gz[^\n]*$"):
        data.load("cifar100", tmp_path / "other")
    server.shutdown()


@pytest.mark.parametrize("size", [24, 112])
def test_a_folder_of_images_of_every_mode(tmp_path, size):
    dataset = data.load("folder", image_tree(tmp_path), image_size=size, workers=1).to("cpu")
    assert type(dataset).__name__ == ("Resident" if size == 24 else "Streamed") and dataset.classes == ["cats", "dogs"]
    batches = list(dataset.train(8, 0, 0))
    assert len(batches) == 3 and all(x.shape == (8, 3, size, size) and x.isfinite().all() for x, _ in batches)
    again = list(dataset.train(8, 0, 0, start=1, rank=1, world=2))
    assert len(again) == 2 and torch.equal(again[0][0], batches[1][0][1::2]) and torch.equal(again[1][1], batches[2][1][1::2])
    if size == 24:                                               # what it is normalised with: of all training pixels
        pixels = dataset.sets["train"][0].reshape(-1, 3).double().numpy() / 255
        np.testing.assert_allclose([dataset.mean, dataset.std], [pixels.mean(0), pixels.std(0)], rtol=1e-9)
    labels = torch.cat([y for _, y in dataset.test(10)])
    assert (labels >= 0).sum() == 24 and labels.sum() + (labels < 0).sum() == 12


@pytest.mark.parametrize("size", [24, 112])
def test_the_first_classes_alone(tmp_path, size):
    dataset = data.load("folder", image_tree(tmp_path), image_size=size, workers=0).to("cpu")
    dataset.keep_classes(1)
    assert dataset.classes == ["cats"] and len(dataset) == 12
    seen = [y for part in (dataset.train(4, 0, 0), dataset.test(5)) for _, y in part]
    assert len(seen) == 6 and sum((y == 0).sum() for y in seen) == 24 and not any((y > 0).any() for y in seen)


def test_labels_belong_to_their_images_in_a_folder(tmp_path):
    dataset = data.load("folder", image_tree(tmp_path), image_size=24, workers=0).to("cpu")
    x, y = next(iter(dataset.train(24, 0, 0)))
    assert ((x.mean((1, 2, 3)) > 0) == (y == 1)).float().mean() > 0.9    # class 1 is the bright one


def test_a_folder_of_photographs_trains_at_224(tmp_path):
    rng = np.random.default_rng(0)
    for split, name in ((s, n) for s in ("train", "val") for n in ("cats", "dogs")):
        (tmp_path / "tree" / split / name).mkdir(parents=True)
        for i in range(2):
            coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
            coarse.resize((500, 375), Image.BICUBIC).save(tmp_path / "tree" / split / name / f"{i}.jpg", quality=90)
    said = python("train.py", "--dataset", "folder", "--data-dir", tmp_path / "tree", "--image-size", 224, "--arch", "sew_resnet18",
                  "--timesteps", 2, "--epochs", 1, "--batch-size", 4, "--augment", "trivial", "--out", tmp_path / "run")
    assert "4 training images of 224x224" in said and "1 epochs of 1 steps" in said and "done: sew_resnet18" in said
    weights = torch.load(tmp_path / "run/last.pt", weights_only=True)["model"]
    assert all(v.isfinite().all() for v in weights.values()) and weights["lif.v_init"] != 0


# ---- events ----------------------------------------------------------------------------------------------------------

HEADER = b"#!AER-DAT2.0\r\n# This is a raw AE data file - do not edit\r\n# Timestamps tick: 1 us\r\n"
RECORDINGS = sorted(pathlib.Path(os.environ.get("DVS_RECORDINGS", "/nowhere")).glob("*.aedat"))


def slow_read(path):
    """An AEDAT 2.0 recording one event at a time: lists t, x, y, p. Written from the format's description alone."""
    raw, at = pathlib.Path(path).read_bytes(), 0
    while raw[at:at + 1] == b"#":
        at = raw.index(b"\n", at) + 1
    t, x, y, p, clock, last = [], [], [], [], 0, None
    while at < len(raw):
        address, stamp = struct.unpack(">II", raw[at:at + 8])
        if last is not None and last - stamp > 2 ** 31:
            clock += 2 ** 32
        last, at = stamp, at + 8
        t.append(clock + stamp)
        x.append(127 - address // 256 % 128)
        y.append(127 - address // 2 % 128)
        p.append(0 if address % 2 else 1)
    return t, x, y, p


def slow_bin(t, x, y, p, frames, height, width, by):
    out = np.zeros((frames, 2, height, width), np.int64)
    share, first, length = len(t) // frames, min(t), max((max(t) - min(t)) // frames, 1)
    for i in range(len(t)):
        if by == "time":
            slot = (t[i] - first) // length
        else:
            slot = i // share if share else frames - 1
        out[min(slot, frames - 1), p[i], y[i], x[i]] += 1
    return out


def pack(addresses, times, header=HEADER):
    return header + b"".join(struct.pack(">II", int(a), int(t) % 2 ** 32) for a, t in zip(addresses, times))


def made_recording(seed, n=2000):
    rng = np.random.default_rng(seed)
    return pack(rng.integers(0, 2 ** 15, n), np.sort(rng.integers(0, 10 ** 6, n)))


def made_set(folder, per_class, classes=tuple(data.CIFAR10), n=300):
    for c in classes:
        (folder / c).mkdir(parents=True)
        for i in range(per_class):
            (folder / c / f"cifar10_{c}_{i}.aedat").write_bytes(made_recording((len(c), ord(c[0]), i), n))


CLOCKS = {
    "rising": np.sort(np.random.default_rng(0).integers(0, 10 ** 6, 997)),
    "gaps": np.r_[np.arange(500), 10 ** 6 + np.arange(497)],                          # empty slices in between
    "equal": np.full(997, 5),
    "wraps": 2 ** 32 - 500 + 2 * np.arange(997),
    "short": np.arange(997) // 200,                                                  # less time than slices
    "few": np.array([7, 9, 9]),                                                      # fewer events than slices
    "back": np.r_[np.arange(1000, 1500), np.arange(900, 1397)],                      # a clock that was set back
}


@pytest.mark.parametrize("case", [*CLOCKS, *map(str, RECORDINGS)])
def test_events_and_frames_equal_a_slow_reader_and_binner(case, tmp_path):
    path = pathlib.Path(case)
    if case in CLOCKS:
        path = tmp_path / "made.aedat"
        path.write_bytes(pack(np.random.default_rng(1).integers(0, 2 ** 15, len(CLOCKS[case])), CLOCKS[case]))
    expected, found = slow_read(path), data.read_aedat(path)
    assert found[0].dtype == np.int64
    for a, b in zip(expected, found):
        assert np.array_equal(a, b)
    for by in ("count", "time"):
        for frames in (1, 4, 10):
            result = data.bin_events(*found, frames=frames, height=128, width=128, by=by)
            assert result.dtype == np.uint16 and np.array_equal(result, slow_bin(*expected, frames, 128, 128, by))
            shortcut = data.aedat_frames(path, frames, by)
            assert shortcut.dtype == np.uint16 and shortcut.flags.c_contiguous and np.array_equal(shortcut, result)


def test_header_lines_end_where_the_number_sign_does_and_address_bits_are_where_they_belong(tmp_path):
    path = tmp_path / "text.aedat"
    stamps = [int.from_bytes(b"#abc"), int.from_bytes(b"\n#hi"), int.from_bytes(b"x\r\n#")]
    path.write_bytes(pack([0x410A, 0x2323, 0x0A23], stamps))                          # bytes of events that look like text
    t, x, y, p = data.read_aedat(path)
    assert t.tolist() == [stamps[0], *(stamps[0] + s - stamps[0] for s in stamps[1:])]
    assert (x.tolist(), y.tolist(), p.tolist()) == ([62, 92, 117], [122, 110, 110], [1, 0, 0])
    path.write_bytes(pack([0, 1, 2, 0xFE, 0x100, 0x7F00], range(6)))
    t, x, y, p = data.read_aedat(path)
    assert x.tolist() == [127, 127, 127, 127, 126, 0] and y.tolist() == [127, 127, 126, 0, 127, 127] and p.tolist() == [1, 0, 1, 1, 1, 1]


def test_reading_gives_back_what_was_written(tmp_path):
    rng = np.random.default_rng(2)
    events = np.sort(rng.integers(0, 9999, 500)), *(rng.integers(0, high, 500) for high in (128, 128, 2))
    data.write_aedat(tmp_path / "a.aedat", *events)
    assert all(np.array_equal(a, b) for a, b in zip(events, data.read_aedat(tmp_path / "a.aedat")))


def test_bin_events_saturates_and_refuses_what_lies_outside():
    many = np.zeros(70000, np.int64)
    assert data.bin_events(many, many, many, many, 1, 2, 2)[0, 0, 0, 0] == 65535
    assert not data.bin_events(many[:0], many[:0], many[:0], many[:0], 3, 2, 2, "time").any()
    one, two = np.array([1]), np.array([2])
    for events in ((one, two, one, one), (one, one, two, one), (one, one, one, two), (one, -one, one, one)):
        with pytest.raises(ValueError, match="outside"):
            data.bin_events(*events, 1, 2, 2)
    for frames, by in ((0, "count"), (1, "number")):
        with pytest.raises(ValueError):
            data.bin_events(one, one, one, one, frames, 2, 2, by)


def test_nmnist_events_equal_a_slow_reader(tmp_path):
    raw = np.random.default_rng(3).integers(0, 256, (400, 5))
    raw[:, :2] %= 34
    (tmp_path / "1.bin").write_bytes(raw.astype(np.uint8).tobytes())
    t, x, y, p = data.read_nmnist(tmp_path / "1.bin")
    for i, (a, b, c, d, e) in enumerate(raw.tolist()):
        assert (t[i], x[i], y[i], p[i]) == ((c % 128 * 256 + d) * 256 + e, a, b, c // 128)


@pytest.mark.parametrize("n, size", [(128, 48), (128, 32), (34, 34), (5, 3)])
def test_area_mean_equals_splitting_every_pixel(n, size):
    frames, cuts = np.random.default_rng(4).integers(0, 60, (3, 2, n, n)), size // math.gcd(n, size)
    fine = frames.repeat(cuts, 2).repeat(cuts, 3)                # areas are whole numbers of such parts
    expected = fine.reshape(3, 2, size, n * cuts // size, size, n * cuts // size).mean((3, 5))
    assert np.allclose(data.area_mean(frames, size), expected, atol=1e-4)


BAD = {"empty": b"", "header only": HEADER, "unfinished header": HEADER + b"# no end", "truncated": made_recording(0)[:-3],
       "zip": b"PK\x03\x04" + bytes(60), "not aedat": b"RIFF" + bytes(60), "AEDAT 3": b"#!AER-DAT3.1\r\n" + bytes(80),
       "address": pack([5, 0x8000], [1, 2]), "absurd": None}


@pytest.mark.parametrize("fault", BAD)
def test_bad_recordings_give_one_line_with_the_name(fault, tmp_path):
    path = tmp_path / "bad one.aedat"
    path.write_bytes(BAD[fault] or b"")
    if fault == "absurd":
        path.write_bytes(HEADER)
        os.truncate(path, 2 ** 34 + 8000)                        # takes no room on the disk
    with pytest.raises(data.UserError) as caught:
        data.read_aedat(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and "replace" in str(caught.value)


@pytest.mark.parametrize("raw", [b"", bytes(7), bytes([34, 0, 0, 0, 0]), bytes([0, 34, 0, 0, 0]), b"PK\x03\x04\x05"])
def test_bad_nmnist_recordings_give_one_line_with_the_name(raw, tmp_path):
    (tmp_path / "1.bin").write_bytes(raw)
    with pytest.raises(data.UserError, match="1.bin.*replace"):
        data.read_nmnist(tmp_path / "1.bin")


def zip_classes(folder, out):
    out.mkdir(parents=True)
    for c in data.CIFAR10:
        with zipfile.ZipFile(out / f"{c}.zip", "w", zipfile.ZIP_DEFLATED) as z:
            z.writestr(f"{c}/", "")
            z.writestr(f"__MACOSX/{c}/._cifar10_{c}_0.aedat", "no recording")
            for path in (folder / c).iterdir():
                z.write(path, f"{c}/{path.name}")


def test_folders_and_zip_files_give_the_same_arrays(tmp_path):
    made_set(tmp_path / "a/cifar10-dvs", 3)
    for c in data.CIFAR10:
        (tmp_path / f"a/cifar10-dvs/{c}/cifar10_{c}_2.aedat").rename(tmp_path / f"a/cifar10-dvs/{c}/cifar10_{c}_100.aedat")
    zip_classes(tmp_path / "a/cifar10-dvs", tmp_path / "b/cifar10-dvs")
    a, b = (data.load("cifar10-dvs", tmp_path / x, timesteps=4, workers=w) for x, w in (("a", 0), ("b", 1)))
    assert a.split == "first100" and a.classes == data.CIFAR10 and a.frames == 4 and a.size == (48, 48)
    assert a.sets["train"][1].tolist() == list(range(10)) and len(a.sets["test"][1]) == 20
    for split in ("train", "test"):
        assert all(u.equal(v) for u, v in zip(a.sets[split], b.sets[split]))
    frames = data.bin_events(*data.read_aedat(tmp_path / "a/cifar10-dvs/cat/cifar10_cat_100.aedat"), 4, 128, 128)
    expected = frames.repeat(3, 2).repeat(3, 3).reshape(4, 2, 48, 8, 48, 8).mean((3, 5))
    x = next(b.test(20))[0]
    assert x.shape == (20, 4, 2, 48, 48) and x.max() < 16
    seen = b.sets["train"][0][3].permute(2, 0, 1).reshape(4, 2, 48, 48) / 16.0       # in events per pixel
    assert abs(seen.numpy() - expected).max() <= 0.5 / 16 + 1e-6
    names = sorted(p.name for p in (tmp_path / "a/cifar10-dvs").glob("*.npy"))
    assert names == [f"{s}_{k}_T4_count_48_first100.npy" for s in ("test", "train") for k in ("images", "labels")]
    assert not list((tmp_path / "a/cifar10-dvs").glob(".parts*"))
    data.load("cifar10-dvs", tmp_path / "a", timesteps=2, bin_by="time", dvs_split="random", workers=0)
    assert (tmp_path / "a/cifar10-dvs/test_images_T2_time_48_random.npy").exists()


def test_splits():
    recordings = [(label, i, f"{label}_{i}", 0) for label in range(10) for i in range(1000)]
    number, label = np.tile(np.arange(1000), 10), np.arange(10).repeat(1000)
    first, drawn, again = (data.test_part(recordings, s) for s in ("first100", "random", "random"))
    assert np.array_equal(first, number < 100)
    assert np.array_equal(drawn, again) and not np.array_equal(drawn, first)
    assert np.bincount(label[drawn]).tolist() == [100] * 10 and len({tuple(number[drawn & (label == c)]) for c in range(10)}) == 10
    recordings = [(7, 1, f"n/{part}/7/1.bin", 0) for part in ("Train", "Test")]
    assert data.test_part(recordings, "official").tolist() == [False, True]


@pytest.mark.parametrize("fault, text", [("none", "cifar10-dvs has no.*figshare"), ("class", "no recordings of class horse"),
                                         ("file", "cat_1.aedat ends in the middle"), ("zip", "horse.zip is no readable zip"),
                                         ("member", "horse.zip/horse/.*cannot be read"), ("split", "first100 makes 20 of 20")])
def test_what_is_wrong_with_a_data_set_is_said_before_work_begins(fault, text, tmp_path, monkeypatch):
    folder = tmp_path / "cifar10-dvs"
    if fault != "none":
        made_set(folder, 2)
    if fault == "file":
        os.truncate(folder / "cat/cifar10_cat_1.aedat", 500)
    if fault in ("class", "zip", "member"):
        for path in (folder / "horse").iterdir():
            path.unlink()
        (folder / "horse").rmdir()
    if fault == "zip":
        (folder / "horse.zip").write_bytes(b"<html>not found</html>")
    if fault == "member":
        with zipfile.ZipFile(folder / "horse.zip", "w") as z:
            z.writestr("horse/cifar10_horse_0.aedat", made_recording(0))
        raw = bytearray((folder / "horse.zip").read_bytes())
        raw[:4] = bytes(4)                                       # where the member should begin
        (folder / "horse.zip").write_bytes(raw)
    monkeypatch.setattr(data, "make_frames", lambda *a, **k: pytest.fail("work began"))
    with pytest.raises(data.UserError, match=text) as caught:
        data.load("cifar10-dvs", tmp_path)
    assert "\n" not in str(caught.value)


def test_a_damaged_zip_member_is_no_recording(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z:
        z.writestr("a/1.aedat", made_recording(0, 9000))
    assert len(data.read_aedat(tmp_path / "a.zip/a/1.aedat")[0]) == 9000
    raw = bytearray((tmp_path / "a.zip").read_bytes())
    raw[50000] ^= 1
    (tmp_path / "b.zip").write_bytes(raw)
    with pytest.raises(data.UserError, match="b.zip/a/1.aedat cannot be read.*CRC"):
        data.read_aedat(tmp_path / "b.zip/a/1.aedat")


def test_missing_nmnist_says_where_to_get_it(tmp_path):
    with pytest.raises(data.UserError, match="Train.zip.*garrickorchard"):
        data.load("nmnist", tmp_path)


def test_an_error_of_a_worker_process_is_one_line(tmp_path):
    made_set(tmp_path / "cifar10-dvs", 2)
    (tmp_path / "cifar10-dvs/dog/cifar10_dog_1.aedat").write_bytes(pack([5, 0x12345], [1, 2]))        # seen only when read
    with pytest.raises(data.UserError, match=r"^[^\n]*dog_1.aedat holds the address 0x12345[^\n]*$"):
        data.load("cifar10-dvs", tmp_path, dvs_split="random", workers=2)
    assert not multiprocessing.active_children()        # left behind, they would keep this process from ending


def test_worker_processes_outlive_signals_but_not_the_program():
    """What reaches the whole group must not end them, and a loader left open must not keep the program from its end."""
    script = ("import os, signal, time, torch, data\n"
              "class Items(torch.utils.data.Dataset):\n"
              "    def __len__(self): return 100\n"
              "    def __getitem__(self, i): time.sleep(0.02); return i\n"
              "batches = iter(torch.utils.data.DataLoader(Items(), num_workers=2, worker_init_fn=data.leave_signals))\n"
              "next(batches), next(batches)                            # both are at work\n"
              "for number in (signal.SIGINT, signal.SIGTERM):\n"
              "    for worker in batches._workers: os.kill(worker.pid, number)\n"
              "for i in range(50): next(batches)\n"
              "print('all there')\n"
              "keep = [batches]; keep.append(keep); batches.keep = keep")
    assert "all there" in python("-c", script, seconds=60)


def test_a_killed_preparation_leaves_no_half_array_and_goes_on(tmp_path, monkeypatch):
    made_set(tmp_path / "cifar10-dvs", 20)                                            # 200 recordings: 8 parts
    script = ("import itertools, os, signal, data; made, count = data.count_slices, itertools.count(1)\n"
              "def killing(*a):                          # runs in the worker: in its fourth part it kills the preparation\n"
              "    if next(count) == 80: os.kill(os.getppid(), signal.SIGKILL)\n"
              "    return made(*a)\n"
              "data.count_slices = killing\n"
              f"data.load('cifar10-dvs', {str(tmp_path)!r}, timesteps=2, dvs_split='random', workers=1)")
    folder = tmp_path / "cifar10-dvs"
    process = subprocess.run([sys.executable, "-c", script], cwd=pathlib.Path(data.__file__).parent)
    assert process.returncode == -signal.SIGKILL
    assert not list(folder.glob("*.npy"))
    done = [np.load(path, allow_pickle=False) for path in folder.glob(".parts*/*.npy")]              # all of them whole
    # The orphaned worker may finish its part and one more, which it was given in advance.
    assert 3 <= len(done) <= 5 and all(part.shape == (25, 2, 2, 48, 48) for part in done)
    calls, count_slices = [], data.count_slices
    monkeypatch.setattr(data, "count_slices", lambda *a: calls.append(1) or count_slices(*a))
    resumed = data.load("cifar10-dvs", tmp_path, timesteps=2, dvs_split="random", workers=0)
    assert 75 <= len(calls) <= 200 - 25 * len(done)
    for path in folder.glob("*.npy"):
        path.unlink()
    fresh = data.load("cifar10-dvs", tmp_path, timesteps=2, dvs_split="random", workers=0)
    for split in ("train", "test"):
        assert all(u.equal(v) for u, v in zip(resumed.sets[split], fresh.sets[split]))


def test_drawn_recordings_are_a_set_like_any_other(tmp_path):
    data.draw_recordings(tmp_path, per_class=1)
    (tmp_path / "ring/drawn_ring_0.aedat").unlink()
    data.draw_recordings(tmp_path, per_class=1)                  # adds what is missing
    found = data.find_recordings("shapes-dvs", tmp_path, data.SHAPES)
    assert [(label, number) for label, number, _, _ in found] == [(label, 0) for label in range(10)]
    for _, _, path, _ in found:
        t, x, y, p = data.read_aedat(path)
        assert len(t) > 1000 and (np.diff(t) >= 0).all() and 0.3 < p.mean() < 0.7


def test_shifts_are_the_same_for_all_frames_of_a_recording_and_digits_are_not_mirrored():
    images = np.zeros((40, 3, 2, 34, 34), np.uint8)
    images[:, :, :, 17, 10] = 1
    labels = np.zeros(40, np.int64)
    found = set()
    x, _ = next(data.Resident("nmnist", (images, labels), (images, labels), ["0"], (0.0, 0.0), (1 / 255,) * 2, pad=5, flip=False).train(40, 0, 0))
    for recording in x:
        places = recording.nonzero()
        assert len(places) == 6 and len({tuple(place[2:].tolist()) for place in places}) == 1
        found.add(tuple(places[0, 2:].tolist()))
    assert {abs(r - 17) <= 5 and abs(c - 10) <= 5 for r, c in found} == {True} and len(found) > 10


# ---- training and evaluation -------------------------------------------------------------------------------------------

def weights(path):
    return torch.load(path, weights_only=True)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    python("train.py", *SMALL, "--limit", 160, "--batch-size", 32, "--epochs", 2, "--out", out)
    return out


def test_training_writes_log_and_checkpoints(trained):
    lines = (trained / "log.csv").read_text().splitlines()
    assert lines[0] == "epoch,lr,train_loss,train_acc,test_acc_t1,test_acc_t2,images_per_s,seconds" and len(lines) == 3
    assert {"last.pt", "best.pt"} <= {p.name for p in trained.iterdir()} and not list(trained.glob(".*.pt*"))


def test_a_checkpoint_evaluates_to_the_same_logits_in_another_process(trained, tmp_path):
    code = ("import sys, torch, eval, data; m = eval.build_network(eval.load_checkpoint(sys.argv[1]));"
            "x, y = next(iter(data.load('shapes').to('cpu').test(64))); torch.save(m(x).detach(), sys.argv[2])")
    python("-c", code, trained / "last.pt", tmp_path / "logits.pt", TORCHDYNAMO_DISABLE="1")
    model = evaluation.build_network(evaluation.load_checkpoint(trained / "last.pt"))
    x, _ = next(iter(data.load("shapes").to("cpu").test(64)))
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), model(x).detach())
    assert sum(n.endswith("v_init") for n in weights(trained / "last.pt")) == 17
    assert any(v != 0 for n, v in weights(trained / "last.pt").items() if n.endswith("v_init"))


def test_evaluation_agrees_with_the_log_and_with_a_plain_count(capsys, trained):
    last = (trained / "log.csv").read_text().splitlines()[-1].split(",")
    said = printed(capsys, evaluation, trained / "last.pt")
    assert f"top-1 {100 * float(last[5]):.2f} %" in said and f"t=1: {100 * float(last[4]):.2f} %" in said and "of 1000 images" in said
    model = evaluation.build_network(evaluation.load_checkpoint(trained / "last.pt"))
    dataset = data.load("shapes").to("cpu")
    dataset.sets["test"] = tuple(v[:250] for v in dataset.sets["test"])
    with torch.no_grad():
        (x, y), = dataset.test(250)
        logits = model(x)
    result = evaluation.evaluate(model, dataset.test(100))       # the last batch is half padding
    assert result["images"] == 250
    assert result["top1"] == pytest.approx((logits.mean(0).argmax(1) == y).double().mean().item())
    assert result["top1_at"][0] == pytest.approx((logits[0].argmax(1) == y).double().mean().item())
    rank = (logits.mean(0) > logits.mean(0).gather(1, y[:, None])).sum(1)
    assert result["top5"] == pytest.approx((rank < 5).double().mean().item())
    assert "t=5:" in printed(capsys, evaluation, trained / "last.pt", "--timesteps", 5, "--images", 50)


def test_a_part_of_the_classes_is_trained_and_evaluated(capsys, tmp_path):
    printed(capsys, train, *SMALL, "--classes", 3, "--limit", 64, "--batch-size", 32, "--epochs", 1, "--out", tmp_path / "run")
    assert weights(tmp_path / "run/last.pt")["head.weight"].shape[0] == 3
    last = (tmp_path / "run/log.csv").read_text().splitlines()[-1].split(",")
    said = printed(capsys, evaluation, tmp_path / "run/last.pt")
    assert f"top-1 {100 * float(last[5]):.2f} %" in said and "of 300 images" in said


def test_the_same_seed_gives_the_same_run_and_another_does_not(capsys, tiny, tmp_path):
    python("train.py", *tiny(), "--out", tmp_path / "there")               # in another process
    printed(capsys, train, *tiny(), "--out", tmp_path / "here")
    printed(capsys, train, *tiny(), "--seed", 1, "--out", tmp_path / "other")
    assert same(weights(tmp_path / "there/last.pt"), weights(tmp_path / "here/last.pt"))
    assert not same(weights(tmp_path / "there/last.pt"), weights(tmp_path / "other/last.pt"))
    cut = lambda name: [line.split(",")[:6] for line in (tmp_path / name / "log.csv").read_text().splitlines()]
    assert cut("there") == cut("here")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such setting")
def test_on_a_cpu_the_memory_of_freed_tensors_is_used_again():
    code = """import resource, torch, data
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(2 ** 24)                                      # 64 MiB: 16,384 pages of 4 KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
at_first, device = faults(), data.use_device("cpu")
faults()
print(at_first, faults())"""
    at_first, kept = map(int, python("-c", code).split())
    assert kept < 100 and (at_first < 100 or at_first > 5 * 16000)       # small at first: the system uses huge pages


@pytest.mark.parametrize("program", ["train.py", "eval.py"])
def test_help_reads_well(program):
    text = python(program, "--help")
    assert "usage:" in text and "python train.py --dataset" in text or "python eval.py" in text
    assert max(map(len, text.splitlines())) <= 130


def test_learning_rate_warms_up_and_falls_to_zero():
    rates = [train.learning_rate(step, 100, {"lr": 0.4, "warmup": 0.1}) for step in range(100)]
    assert rates[0] == pytest.approx(0.04) and max(rates) == pytest.approx(0.4) and rates[-1] < 1e-3
    assert np.argmax(rates) in (9, 10) and all(a >= b for a, b in zip(rates[10:], rates[11:]))


def test_weight_decay_spares_thresholds_decays_and_batchnorm():
    model = models.build("resnet19", 10, 2, width=4)
    optimizer = train.make_optimizer(model, {"optimizer": "sgd", "lr": 0.1, "weight_decay": 0.1, "neuron_rate": 0.5})
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    expected = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert decayed == expected and sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))
    slowed = {id(p) for group in optimizer.param_groups if group["rate"] != 1 for p in group["params"]}
    assert slowed == {id(p) for n in neurons(model) for p in (n.raw_threshold, n.raw_decay)}


# ---- looking inside ----------------------------------------------------------------------------------------------------

FOLDED = [("resnet19", 8, 32), ("resnet18", 8, 64), ("sew_resnet18", 8, 64), ("spikformer", 8, 32)]


def randomised(arch, width, timesteps=2, in_channels=3, num_classes=10, size=32, seed=0, surrogate="trsg"):
    """A network in float64 with every threshold, leak, start, scale, shift and running mean different, that fires in every layer."""
    torch.manual_seed(seed)
    model = models.build(arch, num_classes, timesteps, in_channels, width, surrogate=surrogate).double()
    for module in model.modules():
        if isinstance(module, TrLIF):
            nn.init.uniform_(module.raw_threshold, -1.0, 0.3)            # theta from 0.31 to 0.85
            nn.init.uniform_(module.raw_decay, -0.5, 1.0)
            nn.init.uniform_(module.v_init, -0.1, 0.3)
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(module.weight, 0.7, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.5)
            module.momentum = 0.5
    for module in model.modules():
        if isinstance(module, models.SpikingSelfAttention):
            nn.init.constant_(module.lif.raw_threshold, -4.0)            # theta 0.018: products of few spikes are small
    x = torch.randn(16, in_channels, size, size).double()
    with torch.no_grad():
        for _ in range(4):                                               # statistics that fit, so that spikes arrive at the end
            model.train()(x if in_channels == 3 else x.unsqueeze(1).expand(-1, timesteps, -1, -1, -1))
    for module in model.modules():
        if isinstance(module, TrLIF):
            nn.init.uniform_(module.v_init, -0.1, 0.3).mul_(module.threshold.detach())
    return model.eval()


def batches_of(x, y=None, size=64):
    return [(a, b) for a, b in zip(x.split(size), (torch.zeros(len(x), dtype=torch.long) if y is None else y).split(size))]


def checkpoint_file(path, arch="resnet19", width=4, timesteps=2, model=None):
    network = dict(arch=arch, num_classes=10, timesteps=timesteps, in_channels=3, width=width)
    model = model or randomised(arch, width, timesteps).float()
    mean, std, _ = data.STATISTICS["shapes"]
    torch.save(dict(format=evaluation.FORMAT, network=network, model=model.state_dict(), epoch=1,
                    data=dict(name="shapes", mean=mean, std=std, image_size=32)), path)
    return path


class TwoLayers(nn.Module):
    """conv 3x3 (stride, padding) - LIF - conv - LIF - linear, wired as models.wiring would say for it."""

    def __init__(self, stride, padding):
        super().__init__()
        self.conv1, self.lif1 = nn.Conv2d(1, 1, 1, bias=False), TrLIF(threshold=0.5, tau=1.5)
        self.conv2, self.lif2 = nn.Conv2d(1, 3, 3, stride, padding, bias=False), TrLIF()
        self.head = nn.Linear(3, 4)
        self.timesteps = 2

    def forward(self, x):
        s = models.fire(self.lif1, self.conv1(x).repeat(2, 1, 1, 1), 2)
        s = models.fire(self.lif2, self.conv2(s), 2)
        return self.head(s.mean((2, 3))).unflatten(0, (2, -1))


@pytest.mark.parametrize("stride, padding, by_hand", [
    # A 5x5 image whose corner (0, 0), edge (0, 2), centre (2, 2) and place (3, 4) are lit. The taps of a 3x3 kernel that read
    # a place, rows x columns: without padding a row r is read by 1, 2, 3, 2, 1 kernel rows; with padding 1 by 2, 3, 3, 3, 2;
    # with stride 2 and padding 1 (centres at 0, 2, 4) by 1, 2, 1, 2, 1.
    (1, 0, 1 * 1 + 1 * 3 + 3 * 3 + 2 * 1),
    (1, 1, 2 * 2 + 2 * 3 + 3 * 3 + 3 * 2),
    (2, 1, 1 * 1 + 1 * 1 + 1 * 1 + 2 * 1)])
def test_operations_by_hand(monkeypatch, stride, padding, by_hand):
    wires = [("conv1", None, []), ("conv2", None, ["lif1"]), ("head", None, ["lif2"])], {}
    monkeypatch.setattr(models, "wiring", lambda model: wires)
    model = TwoLayers(stride, padding).eval()
    nn.init.ones_(model.conv1.weight)
    nn.init.constant_(model.conv2.weight, 9.0)
    x = torch.zeros(2, 1, 5, 5)
    for r, c in ((0, 0), (0, 2), (2, 2), (3, 4)):
        x[0, 0, r, c] = 10.0                                             # fires in both steps; the second image stays dark
    result, counts = evaluation.observe(model, batches_of(x))
    conv1, conv2, head = evaluation.operations(model, counts, result["images"])
    assert conv1["macs"] == 25 and conv1["acs"] == 0                     # one multiply-accumulate a pixel, once for both steps
    assert conv2["spikes"] == 2 * 4 / 2                                  # 2 steps, 4 places, over 2 images
    assert conv2["acs"] == 2 * by_hand * 3 / 2 and conv2["macs"] == 0    # 3 output channels
    with torch.no_grad():
        spikes2 = model.lif2(model.conv2(model.lif1(x.expand(2, -1, -1, -1, -1)).flatten(0, 1)).unflatten(0, (2, -1))).count_nonzero()
    assert head["acs"] == spikes2 * 4 / 2 > 0
    taps = {(1, 0): 81, (1, 1): 169, (2, 1): 49}[stride, padding]        # (1+2+3+2+1)^2, (2+3+3+3+2)^2, (1+2+1+2+1)^2
    assert conv2["dense"] == 3 * taps and conv1["dense"] == 25
    assert conv2["pj"] == pytest.approx(0.9 * conv2["acs"]) and conv1["pj"] == pytest.approx(4.6 * 25)


@pytest.mark.parametrize("groups, kernel, stride, padding", [(1, 3, 1, 1), (1, 7, 2, 3), (2, 1, 2, 0), (4, 3, 2, 1)])
def test_fan_out_by_brute_force(groups, kernel, stride, padding):
    conv = nn.Conv2d(4, 8, kernel, stride, padding, groups=groups, bias=False)
    nn.init.ones_(conv.weight)
    fan = evaluation.fan_out(conv, (9, 8))
    for r, c in ((0, 0), (0, 7), (8, 7), (4, 4), (1, 6)):
        spike = torch.zeros(1, 4, 9, 8)
        spike[0, 1, r, c] = 1
        assert fan[r, c] == conv(spike).sum()                            # each connection carries a 1


@pytest.mark.parametrize("arch, width, size", FOLDED)
@pytest.mark.parametrize("events", [False, True])
def test_operations_count_every_spike_of_a_folded_network(arch, width, size, events):
    """Counted with hooks on what really enters each layer of the folded network: exact whole numbers, streams included."""
    model = randomised(arch, width, in_channels=2 if events else 3, size=size)
    shape = (6, 2, 2, size, size) if events else (6, 3, size, size)
    x = torch.randint(0, 3, shape).double() if events else torch.randn(shape).double()
    folded, entered = models.fold(model), {}

    def at_weights(name):
        def hook(layer, inputs):
            s = inputs[0].sum((0, 1) if isinstance(layer, nn.Conv2d) else None)
            entered[name] = float((s * evaluation.fan_out(layer, s.shape)).sum()) / len(x)
        return hook
    for name, layer in folded.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_pre_hook(at_weights(name))
    with torch.no_grad():
        folded(x)
    rows = {}
    for network in (model, models.fold(model)):
        result, counts = evaluation.observe(network, batches_of(x, size=4))
        rows = {row["layer"]: row for row in evaluation.operations(network, counts, result["images"])}
        for name, expected in entered.items():
            if name == "head":                                           # it reads means over places
                expected *= {"resnet19": 64, "spikformer": 64}.get(arch, (size // 32) ** 2)
            if rows[name]["acs"] or events:
                assert rows[name]["acs"] == pytest.approx(expected, rel=1e-12) and rows[name]["macs"] == 0
        assert rows["head"]["dense"] == model.head.weight.numel()        # a conventional head reads each mean once
    stem = next(iter(rows.values()))
    assert (stem["macs"] == 0) == events and (events or stem["macs"] == stem["dense"])


def test_attention_operations():
    model = randomised("spikformer", 4, timesteps=3)
    x, kept = torch.randn(5, 3, 32, 32).double(), {}
    for part in "qkv":
        model.attention[1].get_submodule(part).register_forward_hook(
            lambda _, inputs, o, part=part: kept.__setitem__(part, (o != 0).double().unflatten(2, (12, -1)).transpose(1, 2)))
    result, counts = evaluation.observe(model, batches_of(x))
    rows = {row["layer"]: row for row in evaluation.operations(model, counts, 5)}
    assert kept["q"].sum() > 0
    assert rows["attention.1 k^T v"]["acs"] == pytest.approx(float((kept["k"].transpose(2, 3) @ kept["v"]).sum()) / 5)
    assert rows["attention.1 q (k^T v)"]["acs"] == pytest.approx(float(kept["q"].sum()) * 2 / 5)         # 2 channels a head
    assert rows["attention.1 k^T v"]["dense"] == 64 * 24 * 2


def real_images(n=1000):
    folder = pathlib.Path(os.environ.get("CIFAR_DIR", "/nonexistent")) / "cifar100" / "test_images.npy"
    if not folder.exists():
        return torch.randn(64, 3, 32, 32, dtype=torch.float64)
    images = torch.from_numpy(np.load(folder)[:n]).permute(0, 3, 1, 2).double() / 255
    return (images - 0.48) / 0.27


def test_folding_keeps_low_thresholds_of_attention_finite():
    model = models.fold(models.build("spikformer", 10, 2, width=8, threshold=0.05))
    assert model.attention[0].lif.threshold.item() == pytest.approx(0.5 * 0.05 / 0.05 ** 3, rel=1e-4)


@pytest.mark.parametrize("surrogate", ["trsg", "absolute"])
@pytest.mark.parametrize("arch, width, size", FOLDED)
def test_folding_changes_nothing(arch, width, size, surrogate):
    model = randomised(arch, width, surrogate=surrogate)
    folded, x, sent = models.fold(model), real_images(), {}

    def check(name):
        def hook(_, inputs, o):
            assert ((o == 0) | (o == 1)).all(), name                     # every layer sends 0 or 1
            sent[name] = (o != 0).double().mean().item()
        return hook
    for name, layer in folded.named_modules():
        assert not isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d))
        if isinstance(layer, (TrLIF, nn.MaxPool2d)):
            layer.register_forward_hook(check(name))
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and name not in ("stem.0", "patches.0.0", "head"):
            layer.register_forward_pre_hook(lambda _, inputs, name=name: check(name)(_, None, inputs[0]))    # and receives 0 or 1

    def counts_only(_, inputs):
        assert ((inputs[0] * 64).frac() == 0).all()                      # spike counts over at most 8 x 8 places
    folded.head.register_forward_pre_hook(counts_only)
    with torch.no_grad():
        for part in x.split(50):
            a, b = model(part), folded(part)
            assert (a - b).abs().max() <= 1e-9 * a.abs().max()
            assert (a.argmax(2) == b.argmax(2)).all() and (a.mean(0).argmax(1) == b.mean(0).argmax(1)).all()
            assert a.std(1).min() > 0                                    # the images are told apart: spikes arrived
    assert sum(rate > 0 for rate in sent.values()) > 0.9 * len(sent), sent                               # spikes nearly everywhere
    assert all((layer.surrogate == surrogate) for layer in evaluation.neurons_of(model).values())           # the original is untouched


def test_folding_in_float32_keeps_predictions():
    model = randomised("resnet19", 8).float()
    folded, x = models.fold(model), real_images(400).float()
    with torch.no_grad():
        same = torch.cat([(model(p).mean(0).argmax(1) == folded(p).mean(0).argmax(1)) for p in x.split(50)])
    assert same.float().mean() >= 0.995


def test_wasserstein_from_histograms():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.3, 0.7, 20000), rng.gamma(2.0, 0.5, 20000) - 1
    exact = np.abs(np.sort(a) - np.sort(b)).mean()
    edges = np.linspace(-evaluation.RANGE, evaluation.RANGE, evaluation.BINS + 1)
    laws = [torch.from_numpy(np.histogram(v, edges)[0]) for v in (a, b)]
    assert abs(evaluation.wasserstein(*laws).item() - exact) <= 1 / evaluation.BINS_PER_THRESHOLD
    for v, law in zip((a, b), laws):
        mean, deviation = evaluation.moments(law)
        assert abs(mean - v.mean()) < 1 / 512 and abs(deviation - v.std()) < 0.01


def test_potentials_are_the_neurons_own_and_memory_is_constant():
    model, T, steps = randomised("resnet19", 4, timesteps=3).float(), 3, 15
    x, seen = torch.randn(12, 3, 32, 32), []
    model.lif.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    _, laws = evaluation.potentials(model, batches_of(x, size=4), T, steps)
    current = torch.cat(seen, 1)
    assert current.shape[0] == steps
    v, theta, k, potentials = model.lif.v_init.expand(current.shape[1:]), model.lif.threshold.item(), model.lif.decay.item(), []
    for x_t in current:                                                  # arXiv:2511.08708, restated
        h = v + k * (x_t - v)
        v = h - theta * (h >= theta)
        potentials.append(v / theta)
    edges = np.linspace(-evaluation.RANGE, evaluation.RANGE, evaluation.BINS + 1)
    for row, expected in enumerate([*potentials[:T], torch.stack(potentials[-T:])]):
        exact = torch.from_numpy(np.histogram(expected.detach().clamp(-31.99, 31.99).numpy(), edges)[0])
        assert laws["lif"][row].sum() == exact.sum()
        assert evaluation.wasserstein(laws["lif"][row], exact) < 1e-4    # a rounding may cross an edge
    _, more = evaluation.potentials(model, batches_of(torch.cat([x, x, x]), size=4), T, steps, v_init=0)
    assert [law.shape for law in more.values()] == [law.shape for law in laws.values()]
    few, many = (evaluation.observe(model, batches_of(images))[1] for images in (x, torch.cat([x, x])))
    assert all(torch.equal(2 * few[name], many[name]) for name in few) and few.keys() == many.keys()
    assert model.timesteps == 3 and not any(layer._forward_hooks for layer in model.modules())
    assert not any(layer._forward_pre_hooks for name, layer in model.named_modules() if name != "lif")


def test_event_sequences_are_repeated():
    model = randomised("resnet19", 4, in_channels=2).float()
    x = torch.randint(0, 3, (4, 2, 2, 32, 32)).float()
    result, laws = evaluation.potentials(model, batches_of(x), 2, 10)
    assert len(result["top1_at"]) == 10
    alone = evaluation.evaluate(model, batches_of(x))
    assert result["top1_at"][:2] == alone["top1_at"] and laws["lif"].shape == (3, evaluation.BINS)


@pytest.mark.parametrize("arch", ["resnet19", "spikformer"])
def test_saved_folded_network_predicts_the_same(tmp_path, capsys, arch):
    path = checkpoint_file(tmp_path / "a.pt", arch)
    out = printed(capsys, evaluation, path, "--save-folded", tmp_path / "f.pt", "--images", 64)
    assert "same prediction on 100.00 % of 64 images" in out
    original, folded = (evaluation.build_network(evaluation.load_checkpoint(tmp_path / name)) for name in ("a.pt", "f.pt"))
    x = torch.randn(32, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(models.fold(original)(x), folded(x))
    with pytest.raises(data.UserError, match="folded already"):
        evaluation.main([str(tmp_path / "f.pt"), "--fold", "--images", "64"])
    if arch == "resnet19":                                               # and in a process that knows nothing but the file
        again = python(evaluation.__file__, "f.pt", "--images", 64, "--batch-size", 16, "--device", "cpu", cwd=tmp_path, TORCHDYNAMO_DISABLE="1")
        read_out = [[line for line in text.splitlines() if line.startswith("read out")] for text in (out, again)]
        assert read_out[0] == read_out[1] and "folded" in again


def test_report_comparison_and_plot(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    a, b = checkpoint_file(tmp_path / "a.pt"), checkpoint_file(tmp_path / "b.pt", "sew_resnet18")
    out = printed(capsys, evaluation, a, b, "--images", 20, "--batch-size", 16, "--report", tmp_path / "r.md", "--plot", tmp_path / "p.png")
    text = (tmp_path / "r.md").read_text()
    assert text.startswith("# Comparison") and text.count("## Temporal covariate shift") == 2 and "nan" not in text
    assert "blocks.7.lif2" in text and "4.6 pJ" in text and "sew_resnet18" in out
    for name in ("p.png", "p-2.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"


def test_gradient_table_shows_the_claim(tmp_path):
    for surrogate, spread in (("trsg", 1.5), ("absolute", 1e3)):
        norms = [evaluation.gradient_norms(surrogate, theta, True)[0]["lif"] for theta in (0.1, 1.0, 10.0)]
        assert (max(norms) / min(norms) < 1.5) == (surrogate == "trsg")
        assert max(norms) / min(norms) < 1.5 or max(norms) / min(norms) > spread


@pytest.mark.parametrize("args", [["a.pt", "--plot", "p.png"], ["--gradients", "g.png"]])
def test_missing_matplotlib_is_one_line(monkeypatch, capsys, args):
    monkeypatch.setitem(sys.modules, "matplotlib", None)                 # as if it were not installed
    with pytest.raises(SystemExit) as left:
        evaluation.run(lambda: evaluation.main(args), "eval.py")
    out, err = capsys.readouterr()
    assert left.value.code == 2 and err == "eval.py: error: pictures need matplotlib: pip install matplotlib\n"
    assert out == ""                                                     # said before the work, not after


@pytest.mark.parametrize("args, says", [([], "no checkpoint given"), (["a.pt", "b.pt", "--save-folded", "c.pt"], "takes one checkpoint"),
                                        (["nowhere.pt"], "no such file"), (["nowhere.pt", "--images", "0"], "at least 1"),
                                        (["nowhere.pt", "--device", "nonsense"], "--device nonsense cannot be used here")])
def test_mistakes_are_one_line(capsys, args, says):
    with pytest.raises(SystemExit) as left:
        evaluation.run(lambda: evaluation.main(args), "eval.py")
    err = capsys.readouterr().err
    assert left.value.code == 2 and len(err.splitlines()) == 1 and says in err


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"), MemoryError()])
def test_too_little_memory_is_one_line(capsys, error):
    def main():
        raise error
    with pytest.raises(SystemExit) as left:
        evaluation.run(main, "train.py")
    err = capsys.readouterr().err
    assert left.value.code == 2 and len(err.splitlines()) == 1 and "out of memory, try a smaller --batch-size" in err


# ---- several processes -------------------------------------------------------------------------------------------------

PROCESSES = '''
import os, sys, torch, torch.distributed as dist, torch.nn.functional as F, models, neuron
from torch.nn.parallel import DistributedDataParallel
rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
if world > 1:
    dist.init_process_group("gloo")
neuron.COMPILE, neuron.CPU_COMPILE_FROM = sys.argv[3] != "plain", 0
torch.manual_seed(0)
model = models.build(sys.argv[2], 10, 2, width=4).double().train()
for m in model.modules():
    if isinstance(m, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
        m.eval()                                  # running statistics; affine parameters still train
        torch.nn.init.constant_(m.weight, 2.0)
if sys.argv[3] == "network":
    models.compile_model(model)
trained = DistributedDataParallel(model) if world > 1 else model
optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
for step in range(5):
    g = torch.Generator().manual_seed(step)
    x, y = torch.randn(8, 3, 32, 32, generator=g, dtype=torch.float64), torch.randint(0, 10, (8,), generator=g)
    loss = F.cross_entropy(trained(x[rank::world]).mean(0), y[rank::world])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
if rank == 0:
    torch.save(model.state_dict(), sys.argv[1])
if world > 1:
    dist.barrier()
    del trained                                   # its threads must have ended before the program does
    dist.destroy_process_group()
'''


def torchrun(n, *arguments, **more):
    return python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", n, *arguments, OMP_NUM_THREADS="1", **more)


@pytest.mark.parametrize("arch, fused", [("resnet19", "plain"), ("resnet19", "neurons"), ("resnet19", "network"), ("spikformer", "plain")])
def test_two_processes_equal_one_with_the_whole_batch(tmp_path, arch, fused):
    (tmp_path / "program.py").write_text(PROCESSES)
    python(tmp_path / "program.py", tmp_path / "one.pt", arch, "plain", PYTHONPATH=str(HERE))
    torchrun(2, tmp_path / "program.py", tmp_path / "two.pt", arch, fused, PYTHONPATH=str(HERE))
    one, two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", "two"))
    assert any(one[k].abs() > 1e-3 for k in one if k.endswith("v_init"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-8, atol=1e-8, msg=name)


def test_two_processes_train_as_one_and_count_every_test_image_once(capsys, tiny, tmp_path):
    flags = tiny(17) + ["--epochs", "2"]                         # 17 test images do not divide by two processes
    torchrun(2, "train.py", *flags, "--out", tmp_path / "two")
    row = (tmp_path / "two/log.csv").read_text().splitlines()[-1].split(",")
    counted = printed(capsys, evaluation, tmp_path / "two/last.pt", "--data-dir", flags[flags.index("--data-dir") + 1], "--batch-size", 5)
    assert "of 17 images" in counted
    assert float(counted.split("top-1 ")[1].split()[0]) == pytest.approx(100 * float(row[5]), abs=0.006)


# Two processes of a run: one of them gets SIGTERM in step 5 of 16, both stop after the 10th.
STOPPED = '''
import os, signal, sys, train
from eval import run
rate = train.learning_rate
def stopping(step, *others):
    if step == 4 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return rate(step, *others)
train.learning_rate = stopping
try:
    run(lambda: train.main(sys.argv[1:]), "train.py")
except SystemExit as stopped:
    assert stopped.code == 128 + signal.SIGTERM, stopped.code
'''


def test_two_processes_stopped_and_resumed_equal_two_unbroken(tiny, tmp_path):
    flags = tiny() + ["--epochs", "1", "--batch-size", "4"]
    (tmp_path / "program.py").write_text(STOPPED)
    torchrun(2, "train.py", *flags, "--out", tmp_path / "unbroken")
    assert "after step 10" in torchrun(2, tmp_path / "program.py", *flags, "--out", tmp_path / "resumed", PYTHONPATH=str(HERE))
    torchrun(2, "train.py", "--resume", tmp_path / "resumed")
    a, b = ((tmp_path / name / "log.csv").read_text().splitlines()[1].split(",")[:6] for name in ("unbroken", "resumed"))
    assert a == b                                                # all but the times: loss and accuracy over both parts of the epoch


# ---- interruptions, bad input, long runs -------------------------------------------------------------------------------

@pytest.fixture
def tiny(tmp_path):
    """Flags of a run of a second or two: a narrow network on 64 made images."""
    def make(n_test=16):
        rng = np.random.default_rng(0)
        for split, n in (("train", 64), ("test", n_test)):
            data.write_arrays(tmp_path / "data/cifar10", split, rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8),
                              (np.arange(n) % 10).astype(np.uint8))
        return ["--dataset", "cifar10", "--data-dir", str(tmp_path / "data"), "--arch", "resnet19", "--width", "4",
                "--timesteps", "2", "--batch-size", "8", "--epochs", "3", "--no-compile"]
    return make


# Starts training runs as forks of one process that has imported everything. Each gets a signal at a random moment of one
# of its first steps: the steps are counted, so that it does not depend on the machine's speed how many are interrupted.
INTERRUPTED = '''
import os, random, signal, sys, threading, time, train
from eval import run
number, times, flags = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
rate, sent = train.learning_rate, 0
random.seed(0)

def interrupt(calls, part):
    last = time.perf_counter()
    def learning_rate(*arguments):                           # called at the start of every epoch and step
        nonlocal calls, last
        now = time.perf_counter()
        if calls == 0:
            threading.Timer(part * min(now - last, 0.02), os.kill, (os.getpid(), number)).start()
        calls, last = calls - 1, now
        return rate(*arguments)
    train.learning_rate = learning_rate

while True:
    calls, part = random.randrange(4), random.random()
    child = os.fork()
    if child == 0:
        if sent < times:
            interrupt(calls, part)
        run(lambda: train.main(flags), "train.py")
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == 0:
        break
    assert code in (-number, 128 + number), code
    sent += 1
print("signals", sent)
'''


@pytest.mark.parametrize("number, times, epochs", [(signal.SIGKILL, 20, 12), (signal.SIGTERM, 8, 6)])
def test_killed_or_terminated_runs_continue_bit_for_bit(tiny, tmp_path, number, times, epochs):
    # A checkpoint every 30 ms: kills fall into writing too.
    flags = tiny() + ["--save-every", "0.0005", "--epochs", str(epochs)]
    python("train.py", *flags, "--out", tmp_path / "whole")
    program = tmp_path / "program.py"
    program.write_text(INTERRUPTED)
    said = python(program, int(number), times, *flags, "--out", tmp_path / "parts", "--resume", "auto", PYTHONPATH=str(HERE))
    assert int(said.split()[-1]) == times
    assert same(weights(tmp_path / "whole/last.pt"), weights(tmp_path / "parts/last.pt"))
    cut = lambda name: [line.split(",")[:6] for line in (tmp_path / name / "log.csv").read_text().splitlines()]
    assert cut("whole") == cut("parts")


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_run_of_another_device_continues_whatever_its_memory_format(capsys, tiny, tmp_path, optimizer):
    flags = [*tiny(), "--optimizer", optimizer, "--lr", 0.01]
    printed(capsys, train, *flags, "--epochs", 1, "--out", tmp_path / "cpu")
    shutil.copytree(tmp_path / "cpu", tmp_path / "gpu")
    saved = torch.load(tmp_path / "cpu/last.pt", weights_only=True)
    for state in saved["optimizer"]["state"].values():           # as a GPU's run has it
        state.update({k: v.contiguous(memory_format=torch.channels_last) for k, v in state.items() if v is not None and v.dim() == 4})
    torch.save(saved, tmp_path / "gpu/last.pt")
    for name in ("cpu", "gpu"):
        printed(capsys, train, "--resume", tmp_path / name, "--epochs", 2)
    assert same(weights(tmp_path / "cpu/last.pt"), weights(tmp_path / "gpu/last.pt"))
    fails(capsys, "train.py", ["--resume", tmp_path / "cpu", "--optimizer", "adamw" if optimizer == "sgd" else "sgd"], f"has --optimizer {optimizer}")


def test_pictures_do_not_overwrite_other_files(capsys, tmp_path):
    (tmp_path / "last.pt").write_text("precious")
    for flag in ("--gradients", "--plot"):
        fails(capsys, "eval.py", [flag, tmp_path / "last.pt"], "does not end in .png")
    assert (tmp_path / "last.pt").read_text() == "precious"


def test_a_resumed_run_takes_new_recipe_flags_and_says_so(capsys, tiny, tmp_path):
    flags = tiny()
    printed(capsys, train, *flags, "--epochs", 1, "--out", tmp_path / "run")
    said = printed(capsys, train, "--resume", tmp_path / "run", "--epochs", 2, "--lr", 0.01)
    assert "--epochs is now 2" in said and "--lr is now 0.01" in said and "resumed   at epoch 2" in said
    assert len((tmp_path / "run/log.csv").read_text().splitlines()) == 3


def fails(capsys, program, arguments, expected):
    """program.main(arguments) must end with exit code 2 and one line on stderr that contains expected."""
    main = {"train.py": train.main, "eval.py": evaluation.main}[program]
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        evaluation.run(lambda: main([str(a) for a in arguments]), program)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and error.startswith(f"{program}: error: "), error
    assert expected in error, error


@pytest.mark.parametrize("flags, expected", [
    ("--arch alexnet", "alexnet"), ("--dataset mnist", "mnist"), ("--timesteps 0", "at least 1"), ("--timesteps -3", "at least 1"),
    ("--timesteps two", "two"), ("--width 0", "at least 1"), ("--width 1.5", "1.5"), ("--limit 0", "at least 1"),
    ("--classes 1", "at least 2"), ("--classes 11", "more than the 10 classes of"), ("--limit 100000", "more than the 64"),
    ("--epochs 0", "at least 1"), ("--batch-size 0", "at least 1"),
    ("--batch-size 128", "larger than the data set"), ("--lr 0", "above 0"), ("--lr nan", "above 0"), ("--lr inf", "finite"),
    ("--lr fast", "fast"), ("--weight-decay -1", "at least 0"), ("--warmup 1", "below 1"), ("--warmup -0.1", "at least 0"),
    ("--label-smoothing 1", "below 1"), ("--mixup -1", "at least 0"), ("--threshold 0", "above 0"), ("--threshold -1", "above 0"),
    ("--tau 1", "above 1"), ("--tau 0.5", "above 1"), ("--mp-init mean", "mean"), ("--surrogate atan", "atan"),
    ("--cutout -1", "at least 0"), ("--workers -1", "at least 0"), ("--seed -1", "at least 0"), (f"--seed {2 ** 63}", "below"), ("--save-every 0", "above 0"),
    ("--accumulate 3", "does not divide"), ("--device gpu", "--device gpu"), ("--device hpu", "--device hpu cannot be used here"), ("--device meta", "--device meta cannot"), ("--optimizer lion", "lion"), ("--fast", "--fast"),
    ("--arch spikformer --width 6", "multiple of 4"), ("--near-identity", "needs a tau below 1.5, not 2"), ("--image-size 0", "at least 1"),
    ("--image-size 64", "cifar10 has its own size"), ("--resume auto", "--out"),
    ("--dataset nmnist --augment trivial", "for images"), ("--dataset nmnist --dvs-split random", "--dvs-split is for cifar10-dvs"),
    ("--bin-by time", "for recordings of events"), ("--fixed-neuron --neuron-rate 1", "leave --neuron-rate out"), ("--resume=", "--resume needs the name"),
    ("--resume here --out there", "leave --out out"), (f"--out {'a' * 300}", "too long"), (f"--data-dir {'a' * 300}", "too long"),
    ("--sync-bn", "GPUs only"), ("--resume nowhere", "no such file"), ("--out /proc/run", "cannot write into /proc/run")])
def test_flags_out_of_range(capsys, tiny, tmp_path, flags, expected):
    flags = flags.split()
    out = [] if "--resume" in flags or "--out" in flags else ["--out", tmp_path / "run"]
    fails(capsys, "train.py", [*tiny(), *out, *flags], expected)
    assert not list((tmp_path / "run").glob("*"))


class Bomb:
    def __reduce__(self):
        return os.system, ("touch /tmp/this-must-not-run",)


@pytest.mark.parametrize("spoil, expected", [
    (lambda d: np.save(d / "train_images.npy", np.zeros((64, 32, 32, 3), np.float32)), "must be uint8 [N, 32, 32, 3]"),
    (lambda d: np.save(d / "train_images.npy", np.zeros((64, 3, 32, 32), np.uint8)), "must be uint8 [N, 32, 32, 3]"),
    (lambda d: np.save(d / "test_images.npy", np.zeros((0, 32, 32, 3), np.uint8)), "N > 0"),
    (lambda d: np.save(d / "train_labels.npy", np.zeros(63, np.uint8)), "must hold 64 whole numbers"),
    (lambda d: np.save(d / "train_labels.npy", np.zeros((64, 1), np.uint8)), "must hold 64 whole numbers"),
    (lambda d: np.save(d / "train_labels.npy", np.zeros(64)), "must hold 64 whole numbers"),
    (lambda d: np.save(d / "train_labels.npy", np.full(64, 10)), "not from 0 to 9"),
    (lambda d: np.save(d / "test_labels.npy", np.full(16, -1)), "not from 0 to 9"),
    (lambda d: np.save(d / "train_labels.npy", np.array([Bomb()] * 64, object)), "no readable .npy"),
    (lambda d: (d / "train_images.npy").write_bytes((d / "train_images.npy").read_bytes()[:5000]), "no readable .npy"),
    (lambda d: (d / "train_images.npy").write_bytes(b""), "no readable .npy"),
    (lambda d: (d / "train_images.npy").write_text("hello"), "no readable .npy"),
    (lambda d: ((d / "train_images.npy").unlink(), (d / "train_images.npy").mkdir()), "no readable .npy")])
def test_bad_arrays(capsys, tiny, tmp_path, spoil, expected):
    flags = tiny()
    spoil(tmp_path / "data/cifar10")
    fails(capsys, "train.py", [*flags, "--out", tmp_path / "run"], expected)
    assert not (tmp_path / "run").exists() and not os.path.exists("/tmp/this-must-not-run")


def test_no_data_and_no_network(capsys, monkeypatch, tmp_path):
    import urllib.error
    import urllib.request

    def offline(*_, **__):
        raise urllib.error.URLError("no route to host")
    monkeypatch.setattr(urllib.request, "urlopen", offline)
    for name, original in (("cifar10", "cifar-10-python.tar.gz"), ("cifar100", "cifar-100-python.tar.gz")):
        fails(capsys, "train.py", ["--dataset", name, "--data-dir", tmp_path, "--out", tmp_path / "run"], original)


@pytest.mark.parametrize("spoil, expected", [
    (lambda d: shutil.rmtree(d / "train"), "no folder train"), (lambda d: shutil.rmtree(d / "val"), "no folder test or val"),
    (lambda d: [shutil.rmtree(p) for p in (d / "train").iterdir()], "train"),
    (lambda d: [p.unlink() for p in (d / "train/cats").iterdir()], "cats"),
    (lambda d: (d / "val/dogs").rename(d / "val/hens"), "hens"),
    (lambda d: (d / "train/cats/0.png").write_text("no image"), "0.png: not a readable image"),
    (lambda d: Image.new("1", (20000, 20000)).save(d / "train/cats/0.png"), "0.png: not a readable image: Image size"),
    (lambda d: (d / "val/dogs/0.png").write_bytes((d / "val/dogs/0.png").read_bytes()[:300]), "0.png: not a readable image")])
@pytest.mark.parametrize("size", [16, 112])
def test_bad_image_folders(capsys, tmp_path, size, spoil, expected):
    tree = image_tree(tmp_path / "tree", n=1)
    spoil(tree)
    fails(capsys, "train.py", ["--dataset", "folder", "--data-dir", tree, "--image-size", size, "--width", 4, "--batch-size", 8,
                               "--timesteps", 1, "--epochs", 1, "--no-compile", "--workers", 1, "--out", tmp_path / "run"], expected)


def bad_checkpoints(good, folder):
    """(path, expected) of files that are no good checkpoints, made from a good one."""
    raw = good.read_bytes()
    for i in range(10):
        path = folder / f"truncated{i}.pt"
        path.write_bytes(raw[:len(raw) * i // 10])
        yield path, "truncated" if i else "cannot be read"
    whole = torch.load(good, weights_only=True)
    other = {**whole, "network": {**whole["network"], "width": 8}}
    for name, content, expected in [("foreign", {"state_dict": {}}, "is no checkpoint of train.py"), ("list", [1], "is no checkpoint"),
                                    ("tensor", torch.zeros(3), "is no checkpoint"), ("shapes", other, "do not fit"),
                                    ("less", {k: v for k, v in whole.items() if k not in ("model", "epoch")}, "lacks epoch, model"),
                                    ("code", {"format": Bomb()}, "plain data")]:
        torch.save(content, folder / f"{name}.pt")
        yield folder / f"{name}.pt", expected
    (folder / "text.pt").write_text("not a checkpoint at all")
    np.save(folder / "array.npy", np.zeros(9))
    for name, expected in (("text.pt", ""), ("array.npy", ""), ("missing.pt", "no such file"), ("", "")):
        yield folder / name, expected


def test_bad_checkpoints(capsys, trained, tmp_path):
    before = {p.name: p.read_bytes() for p in trained.iterdir()}
    cases = list(bad_checkpoints(trained / "last.pt", tmp_path))
    assert len(cases) == 20
    for path, expected in cases:
        fails(capsys, "eval.py", [path], expected)
    assert not os.path.exists("/tmp/this-must-not-run")
    assert before == {p.name: p.read_bytes() for p in trained.iterdir()}


@pytest.mark.parametrize("flags, expected", [
    ("--arch resnet18", "--arch resnet19, not resnet18"), ("--dataset cifar100", "--dataset shapes, not cifar100"),
    ("--timesteps 4", "--timesteps 2, not 4"), ("--width 8", "--width 4, not 8"),
    ("--classes 5", "--classes None, not 5"), ("--mp-init off", "--mp-init active, not off"), ("--tau 3", "--tau 2.0, not 3.0"), ("--threshold 2", "--threshold 1.0, not 2.0")])
def test_a_resumed_run_must_keep_its_network_and_data(capsys, trained, flags, expected):
    before = (trained / "last.pt").read_bytes()
    fails(capsys, "train.py", ["--resume", trained, *flags.split()], expected)
    fails(capsys, "train.py", [*SMALL, "--out", trained], "holds a run already")
    fails(capsys, "train.py", ["--resume", trained / "last.pt"], f"needs the folder of the run, {trained}")
    assert (trained / "last.pt").read_bytes() == before


def test_a_run_does_not_replace_what_is_left_of_another(capsys, trained, tmp_path):
    shutil.copy(trained / "best.pt", tmp_path / "best.pt")
    fails(capsys, "train.py", [*SMALL, "--out", tmp_path], "holds a run already (best.pt)")
    assert (tmp_path / "best.pt").read_bytes() == (trained / "best.pt").read_bytes()


@pytest.mark.parametrize("flags, expected", [(["--report", "last.pt", "other.pt"], "does not end in .md"), (["last.pt", "--save-folded", "last.pt"], "is not a folded network"),
                                             (["last.pt", "--save-folded", "null.pt"], "no ordinary file")])
def test_evaluation_does_not_replace_checkpoints_and_special_files(capsys, trained, tmp_path, monkeypatch, flags, expected):
    monkeypatch.chdir(tmp_path)
    shutil.copy(trained / "last.pt", tmp_path)
    os.symlink(os.devnull, "null.pt")
    fails(capsys, "eval.py", [*flags, "--images", 2], expected)
    assert (tmp_path / "last.pt").read_bytes() == (trained / "last.pt").read_bytes()


def test_a_flipped_bit_in_a_checkpoint_is_found(capsys, trained, tmp_path):
    content = bytearray((trained / "last.pt").read_bytes())
    content[len(content) // 2] ^= 16
    (tmp_path / "last.pt").write_bytes(content)
    fails(capsys, "eval.py", [tmp_path / "last.pt"], "is damaged")


def test_other_classes_of_the_same_number_are_refused(capsys, tmp_path):
    for name in "ab":
        for path in (f"{name}/{split}/{name}{c}" for split in ("train", "test") for c in range(3)):
            (tmp_path / path).mkdir(parents=True)
            for i in range(6):
                Image.new("RGB", (8, 8)).save(tmp_path / path / f"{i}.png")
    flags = [*SMALL, "--dataset", "folder", "--image-size", 8, "--batch-size", 6, "--epochs", 1, "--workers", 0, "--data-dir", tmp_path / "a"]
    printed(capsys, train, *flags, "--out", tmp_path / "run")
    printed(capsys, evaluation, tmp_path / "run/last.pt", "--data-dir", tmp_path / "a", "--workers", 0)
    fails(capsys, "eval.py", [tmp_path / "run/last.pt", "--data-dir", tmp_path / "b", "--workers", 0], "are not those that the checkpoint was trained on")
    fails(capsys, "train.py", ["--resume", tmp_path / "run", "--epochs", 2, "--data-dir", tmp_path / "b"], "other classes")


def test_a_reader_who_leaves_costs_nothing(tmp_path):
    """train.py | head -1: it ends quietly at the next line, and the epoch before that line is saved."""
    run = subprocess.Popen([sys.executable, "train.py", *SMALL, "--limit", "32", "--batch-size", "16", "--epochs", "50", "--out", str(tmp_path / "run")],
                           cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    run.stdout.readline()
    run.stdout.close()
    error = run.stderr.read().decode()
    assert run.wait() == 141 and "Traceback" not in error, error
    assert len((tmp_path / "run/log.csv").read_text().splitlines()) == 2 and (tmp_path / "run/last.pt").exists()


def raising(error):
    raise error


@pytest.mark.parametrize("main, advice", [
    (functools.partial(torch.empty, 2 ** 55), "smaller --batch-size"), (functools.partial(raising, MemoryError()), "smaller --batch-size"),
    (functools.partial(raising, RuntimeError("unable to allocate shared memory(shm) for file </torch_1>")), "try --workers 0"),
    (functools.partial(raising, torch._dynamo.exc.TorchRuntimeError("No working C++ compiler found")), "give --no-compile")])
def test_what_the_machine_lacks_is_one_line_with_advice(capsys, main, advice):
    with pytest.raises(SystemExit) as caught:
        evaluation.run(main, "train.py")
    said = capsys.readouterr().err
    assert caught.value.code == 2 and said.count("\n") == 1 and advice in said


def test_a_folded_network_does_not_go_on_training(capsys, trained, tmp_path):
    printed(capsys, evaluation, trained / "last.pt", "--save-folded", tmp_path / "last.pt", "--images", 10)
    fails(capsys, "train.py", ["--resume", tmp_path], "folded network, which is for evaluation")


def test_a_single_value_a_channel_is_one_line(capsys, tmp_path):
    fails(capsys, "train.py", ["--dataset", "shapes", "--image-size", 2, "--arch", "resnet18", "--width", 4, "--batch-size", 1, "--limit", 10,
                               "--no-compile", "--out", tmp_path], "cannot learn from such batches")


def test_several_processes_without_a_launcher_are_one_line(capsys, tiny, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    fails(capsys, "train.py", tiny(), "LOCAL_RANK, MASTER_ADDR, MASTER_PORT, RANK not set")


def test_classes_without_a_test_image_are_refused(tmp_path):
    for split, labels in (("train", [0, 1, 2, 3]), ("test", [3, 3])):
        data.write_arrays(tmp_path / "cifar10", split, np.zeros((len(labels), 32, 32, 3), np.uint8), np.array(labels, np.uint8))
    with pytest.raises(data.UserError, match="--classes 2 leaves no"):
        data.load("cifar10", tmp_path).keep_classes(2)


def test_where_there_are_no_file_locks_nobody_is_kept_out(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "fcntl", None)                     # as on Windows
    with data.lock(tmp_path / "run", wait=False), data.lock(tmp_path / "run", wait=False):
        pass


def test_two_runs_do_not_write_into_one_folder(capsys, tiny, tmp_path):
    held = data.lock(tmp_path / "run", wait=False)
    fails(capsys, "train.py", [*tiny(), "--out", tmp_path / "run"], "another process is writing into")
    held.close()


def test_a_full_disk_leaves_the_previous_checkpoint(capsys, tiny, tmp_path):
    flags = tiny()
    printed(capsys, train, *flags, "--epochs", 1, "--out", tmp_path / "run")
    before = (tmp_path / "run/last.pt").read_bytes()
    code = ("import resource, sys, train, eval; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000));"
            "eval.run(lambda: train.main(sys.argv[1:]), 'train.py')")
    error = python("-c", code, "--resume", tmp_path / "run", "--epochs", 2, code=2)
    lines = [line for line in error.splitlines() if "Warning" not in line]
    assert lines[-1].startswith("train.py: error: cannot write") and "Traceback" not in error, error
    assert (tmp_path / "run/last.pt").read_bytes() == before
    assert {p.name for p in (tmp_path / "run").iterdir()} <= {"last.pt", "best.pt", "log.csv", ".lock"}


def test_divergence_is_reported_and_the_last_good_state_kept(capsys, tiny, tmp_path):
    flags = tiny()
    fails(capsys, "train.py", [*flags, "--lr", "1e30", "--warmup", 0, "--out", tmp_path / "fast"], "NaN or infinite in epoch")
    printed(capsys, train, *flags, "--epochs", 1, "--out", tmp_path / "run")
    checkpoint = torch.load(tmp_path / "run/last.pt", weights_only=True)
    checkpoint["model"]["blocks.3.conv2.weight"][0, 0, 0, 0] = float("inf")
    torch.save(checkpoint, tmp_path / "run/last.pt")
    before = (tmp_path / "run/last.pt").read_bytes()
    fails(capsys, "train.py", ["--resume", tmp_path / "run", "--epochs", 2], "first layer with such values: blocks.3.conv2 (Conv2d)")
    assert (tmp_path / "run/last.pt").read_bytes() == before


@pytest.mark.parametrize("mode", ["plain", "fused"])
def test_memory_does_not_grow_over_2000_steps(request, mode):
    request.getfixturevalue(mode)
    model = models.ResNet([(8, 1, 1), (16, 1, 2)], 10, 2, 3, 8, {})
    optimizer, used = torch.optim.SGD(model.parameters(), 0.01), []
    x, y = torch.randn(4, 3, 8, 8), torch.arange(4)
    for _ in range(2000):
        optimizer.zero_grad()
        F.cross_entropy(model(x).mean(0), y).backward()
        optimizer.step()
        used.append(int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096)
    assert np.mean(used[-100:]) - np.mean(used[100:200]) < 8 * 2 ** 20
