"""Tests, a section per component. Run: python -m pytest -q test_neuron.py

They compare with something independent: a NumPy oracle whose backward pass is derived by hand, a
lemma of the paper, what the authors' code computes, a slow reader, a second process, a run that
was not interrupted.
"""
import copy
import functools
import hashlib
import http.server
import math
import multiprocessing
import os
import pathlib
import pickle
import platform
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import types
import warnings
import zipfile

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.utils.checkpoint import checkpoint

import data
import eval as evaluation
import models
import neuron
import train
from neuron import TrLIF

HERE = pathlib.Path(__file__).resolve().parent
# As the programs that tests start have it: the same sums, in the same order.
torch.set_num_threads(1)
SMALL = "--dataset shapes --arch resnet19 --width 4 --timesteps 2 --no-compile".split()


def python(*arguments, cwd=HERE, code=0, seconds=600, **environment):
    """The output of a Python program in a process of its own. code: the exit status expected."""
    # The path: programs of these tests lie elsewhere.
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, *map(str, arguments)]
    how = dict(cwd=cwd, capture_output=True, text=True, timeout=seconds)
    done = subprocess.run(command, env=environment, **how)
    report = f"exit {done.returncode}, not {code}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert done.returncode == code, report
    return done.stdout if code == 0 else done.stderr


def printed(capsys, program, *arguments):
    """What a program (a module) prints when it runs in this process, which saves the imports."""
    capsys.readouterr()
    try:
        program.main([str(argument) for argument in arguments])
    except SystemExit as end:
        assert not end.code
    return capsys.readouterr().out


def fails(capsys, program, arguments, expected):
    """A program (a module) must exit with 2 and say what is expected in one line of error."""
    name, main = f"{program.__name__}.py", program.main
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        train.run(lambda: main([str(argument) for argument in arguments]), name)
    error = capsys.readouterr().err
    # argparse puts its usage before the line.
    assert end.value.code == 2 and (error.count("\n") == 1 or error.startswith("usage: ")), error
    last = error.splitlines()[-1]
    assert last.startswith(f"{name}: error: ") and expected in last, error


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """Nothing is compiled unless a test asks for it, and runs in this process leave no trace."""
    monkeypatch.setattr(neuron, "COMPILE", False)
    # argparse takes the program's name from here.
    monkeypatch.setattr(sys, "argv", ["train.py"])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)


@pytest.fixture
def fused(monkeypatch):
    """Fuse however small the input is, and fail where a layer falls back to the plain loop."""
    monkeypatch.setattr(neuron, "COMPILE", True)
    monkeypatch.setattr(neuron, "CPU_COMPILE_FROM", 0)
    monkeypatch.setattr(neuron, "FAILED", set())
    yield
    assert neuron.COMPILE and not neuron.FAILED, "compiling failed: the plain loop ran"


# ---- neuron --------------------------------------------------------------------------------------


def oracle(x, g, v, theta, k, surrogate):
    """The neuron in NumPy: spikes, v[T], fired, and the gradients of sum(g * spikes) in x, theta
    and k, derived by hand."""
    T = len(x)
    h, s, w, before = (np.zeros_like(x) for _ in range(4))
    v = np.broadcast_to(np.float64(v), x[0].shape).copy()
    for t in range(T):
        before[t] = v
        h[t] = v + k * (x[t] - v)
        s[t] = h[t] >= theta
        distance = h[t] / theta - 1 if surrogate == "trsg" else h[t] - theta
        w[t] = abs(distance) <= 0.5
        v = h[t] - theta * s[t]
    # gv = dL/dv[t], arriving from the next step.
    gx, gtheta, gk, gv = np.zeros_like(x), 0.0, 0.0, np.zeros_like(v)
    for t in reversed(range(T)):
        if surrogate == "trsg":
            # o = theta s:  do/dh = w,  do/dtheta = s - r w.  v[t] = h - o.
            go = g[t] - gv
            gh = gv + go * w[t]
            gtheta += (go * (s[t] - h[t] / theta * w[t])).sum()
        else:
            # ds/dh = w,  ds/dtheta = -w.  v[t] = h - theta s.
            gs = g[t] - theta * gv
            gh = gv + gs * w[t]
            gtheta += (-gv * s[t] - gs * w[t]).sum()
        # h = v + k (x - v).
        gx[t] = k * gh
        gk += (gh * (x[t] - before[t])).sum()
        gv = (1 - k) * gh
    spikes = theta * s if surrogate == "trsg" else s
    return spikes, v, s.any(0), gx, gtheta, gk


def as_numpy(tensor):
    return tensor.detach().double().cpu().numpy()


def assert_close(value, expected, tolerance):
    """Relative to the largest of the expected values."""
    atol = tolerance * np.abs(expected).max()
    np.testing.assert_allclose(value, expected, rtol=tolerance, atol=atol)


def channels_last(x):
    """[T, B, C, H, W] with the same values, its channels next to each other in memory."""
    folded = x.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    return folded.unflatten(0, x.shape[:2])


def check_against_oracle(layer, T, dtype, tolerance, shape=(3, 2, 4, 5), layout=lambda x: x):
    """Three batches, so that v_init matters. layout: how the currents lie in memory."""
    torch.manual_seed(T)
    mu = 0.0
    device = layer.v_init.device
    for _ in range(3):
        x = 2 * layer.threshold.item() * torch.randn(T, *shape)
        x = layout(x.to(device, dtype)).requires_grad_()
        g = layout(torch.randn(T, *shape).to(device, dtype))
        layer.zero_grad()
        spikes = layer(x)
        spikes.backward(g)
        theta, k = layer.threshold.item(), layer.decay.item()
        expected = oracle(as_numpy(x), as_numpy(g), mu, theta, k, layer.surrogate)
        o, v, fired, gx, gtheta, gk = expected
        assert spikes.dtype == dtype and spikes.shape == x.shape
        assert_close(as_numpy(spikes), o, tolerance)
        assert_close(as_numpy(x.grad), gx, tolerance)
        # The derivatives of softplus and sigmoid.
        raw_gtheta = gtheta * torch.sigmoid(layer.raw_threshold).item()
        assert_close(layer.raw_threshold.grad.item(), raw_gtheta, tolerance)
        assert_close(layer.raw_decay.grad.item(), gk * k * (1 - k), tolerance)
        chosen = fired if layer.mp_init == "active" else np.ones_like(fired)
        if layer.mp_init != "off" and chosen.any():
            mu = 0.9 * mu + 0.1 * v[chosen].mean()
        assert_close(layer.v_init.item(), np.float64(mu), tolerance)
        mu = layer.v_init.item()


@pytest.mark.parametrize("surrogate", ["trsg", "absolute"])
@pytest.mark.parametrize("tau", [1.25, 2, 5])
@pytest.mark.parametrize("theta", [0.25, 1, 2.5])
@pytest.mark.parametrize("T", [1, 2, 4, 6])
def test_outputs_and_gradients_equal_the_oracle(T, theta, tau, surrogate):
    layer = TrLIF(theta, tau, surrogate=surrogate).double()
    check_against_oracle(layer, T, torch.float64, 1e-12)


@pytest.mark.parametrize("mp_init", ["all", "off"])
def test_other_initialisations_equal_the_oracle(mp_init):
    check_against_oracle(TrLIF(mp_init=mp_init).double(), 4, torch.float64, 1e-12)


DTYPES = [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]


@pytest.mark.parametrize("dtype, tolerance", DTYPES)
@pytest.mark.parametrize("surrogate", ["trsg", "absolute"])
def test_fused_equals_the_oracle(fused, surrogate, dtype, tolerance):
    layer = TrLIF(surrogate=surrogate)
    layer = layer.double() if dtype == torch.float64 else layer
    check_against_oracle(layer, 2, dtype, tolerance, shape=(16, 8, 9, 9))


@pytest.mark.parametrize("mode", ["plain", "fused"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("theta", [0.3, 1.0, 2.7])
def test_a_potential_exactly_at_the_threshold_spikes(request, mode, training, theta):
    request.getfixturevalue(mode)
    layer = TrLIF(theta, tau=2).train(training)
    threshold = layer.threshold.detach()
    below = torch.nextafter(threshold, torch.tensor(0.0))
    # k = 1/2: h = x / 2, exactly theta or just below.
    spikes = layer(torch.stack([2 * threshold, 2 * below]).expand(1, 2))
    assert torch.equal(spikes, torch.stack([threshold, torch.tensor(0.0)])[None])


@pytest.mark.parametrize("c", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("surrogate", ["trsg", "absolute"])
def test_scaling_current_and_threshold_leaves_trsg_gradients_as_they_were(surrogate, c):
    def gradients(scale):
        torch.manual_seed(0)
        x = (scale * 2 * torch.randn(4, 50, dtype=torch.float64)).requires_grad_()
        theta = torch.tensor(1.3 * scale, dtype=torch.float64, requires_grad=True)
        v_init = torch.tensor(0.2 * scale, dtype=torch.float64)
        k = torch.tensor(0.4, dtype=torch.float64)
        spikes = torch.stack(neuron.lif(x, v_init, theta, k, surrogate)[0])
        spikes.backward(torch.randn(4, 50, dtype=torch.float64))
        return spikes.detach(), x.grad, theta.grad

    (o_1, gx_1, gtheta_1), (o_c, gx_c, gtheta_c) = gradients(1.0), gradients(c)
    if surrogate == "trsg":
        torch.testing.assert_close(o_c, c * o_1, rtol=1e-9, atol=0)
        torch.testing.assert_close((gx_c, gtheta_c), (gx_1, gtheta_1), rtol=1e-9, atol=1e-12)
    elif c != 1:
        # The naive form: vanishing, or other, gradients.
        assert (gx_c - gx_1).norm() > 0.3 * gx_1.norm()
        assert abs(gtheta_c - gtheta_1) > 0.3 * abs(gtheta_1)


@pytest.mark.parametrize("s", [0.5, 1.0])
@pytest.mark.parametrize("m", [0.5, 1.0])
def test_mp_init_halves_the_shift_between_early_and_late_steps(m, s):
    def shift(v_init):
        x = m + s * torch.randn(50, 20000, generator=torch.Generator().manual_seed(1))
        theta, k = torch.tensor(1.0), torch.tensor(0.5)
        first, last = (neuron.lif(x[:n], v_init, theta, k)[1] for n in (1, 50))
        # The 1-Wasserstein distance of two samples of equal size.
        return (first.sort()[0] - last.sort()[0]).abs().mean()

    torch.manual_seed(0)
    layer = TrLIF()
    # 0.9 ** 60: the start is forgotten.
    for _ in range(60):
        layer(m + s * torch.randn(4, 5000))
    assert shift(layer.v_init) < 0.5 * shift(torch.tensor(0.0))


def test_v_init_is_saved_frozen_in_evaluation_and_left_alone_by_silence():
    layer = TrLIF()
    # Nothing fires.
    layer(torch.full((3, 5), -1.0))
    assert layer.v_init == 0 and "v_init" in layer.state_dict()
    layer(torch.randn(3, 500))
    learnt = layer.v_init.clone()
    assert learnt != 0
    layer.eval()(torch.randn(3, 500))
    assert torch.equal(layer.v_init, learnt)
    restored = TrLIF()
    restored.load_state_dict(layer.state_dict())
    assert torch.equal(restored.v_init, learnt)


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
    assert half.v_init.dtype == torch.float16
    assert half.v_init.item() == pytest.approx(full.v_init.item(), rel=1e-2)


def test_fixed_neurons_do_not_learn():
    layer = TrLIF(learnable=False)
    x = torch.randn(2, 100, requires_grad=True)
    layer(x).sum().backward()
    assert layer.raw_threshold.grad is None and layer.raw_decay.grad is None
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("theta, tau", [(1e-3, 1.001), (1.0, 2.0), (50.0, 1000.0)])
def test_threshold_and_tau_start_where_asked(theta, tau):
    layer = TrLIF(theta, tau).double()
    assert layer.threshold.item() == pytest.approx(theta, rel=1e-5)
    assert layer.tau.item() == pytest.approx(tau, rel=1e-3)
    # NumPy's numbers make no layer of float64.
    of_numpy = TrLIF(np.float64(theta), np.float64(tau))
    assert {value.dtype for value in of_numpy.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("mode", ["plain", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_format_is_kept_and_does_not_matter(request, mode, dtype):
    request.getfixturevalue(mode)
    x = torch.randn(2, 3, 4, 5, 6).to(dtype)
    batch_before_time = x.transpose(0, 1).contiguous().transpose(0, 1)
    results = []
    for variant in (x, channels_last(x), batch_before_time):
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
    x, kept = torch.randn(2, 4, 250, requires_grad=True), []
    start, theta, k = torch.zeros(()), torch.ones((), requires_grad=True), torch.full((), 0.5)
    plain = neuron.lif_and_mean_recomputed
    for function in (plain, neuron.compiled(plain)):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            spikes, _ = function(x, start, theta, k, "trsg", "active", False)
        besides = [t.shape for t in kept if t.data_ptr() != x.data_ptr()]
        assert sum(shape.numel() for shape in besides) < 100, besides
        spikes.sum().backward()


@pytest.mark.parametrize("surrogate", ["trsg", "absolute"])
def test_sums_over_rows_are_sums_over_the_layer(surrogate):
    """A GPU adds up row by row, a CPU all neurons at once."""
    torch.manual_seed(0)
    x, gradient = torch.randn(2, 2, 96).double().unbind()
    fused_loop = neuron.compiled(neuron.lif_and_mean_recomputed)
    results = []
    for shape in ((2, 1, 96), (2, 8, 12), (2, 96, 1), "fused"):
        function = fused_loop if shape == "fused" else neuron.lif_and_mean_recomputed
        shape = (2, 8, 12) if shape == "fused" else shape
        values = x.view(shape), torch.tensor(0.7).double(), torch.tensor(0.4).double()
        current, theta, k = (value.clone().requires_grad_() for value in values)
        start = torch.tensor(0.1).double()
        spikes, mean = function(current, start, theta, k, surrogate, "active", False)
        spikes.backward(gradient.view(shape))
        flat = spikes.detach().flatten(), current.grad.flatten()
        results.append((*flat, mean, theta.grad, k.grad))
    assert results[0][2] != 0.1 and results[0][3] != 0
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-12, atol=1e-12)


@pytest.fixture
def compilations(fused):
    """Forget what was compiled. Returns a function: how many graphs were compiled since."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    forget = neuron.compiled.cache_clear
    forget()
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    forget()


@pytest.fixture
def captures(compilations, monkeypatch):
    """The same without generating code, for tests of what is fused and not of what comes out."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **_: compiler(f, dynamic=True, backend="eager"))
    return compilations


# 17 layers of 5 shapes, and 33 layers whose currents are views of many kinds.
@pytest.mark.parametrize("arch", ["resnet19", "spikformer"])
def test_few_compilations_serve_a_whole_training(compilations, arch):
    model = models.build(arch, 10, timesteps=2, width=4)
    # Batches of three sizes, both modes.
    for batch in (8, 8, 5, 3):
        model.train()(torch.randn(batch, 3, 32, 32)).sum().backward()
        with torch.no_grad():
            model.eval()(torch.randn(batch, 3, 32, 32))
    assert compilations() <= 4


def test_many_time_steps_in_one_process_all_run_fused(captures):
    for T in range(2, 12):
        TrLIF()(torch.randn(T, 3, 5))
    # torch alone would stop compiling at 8.
    assert captures() == 10


def test_long_sequences_run_fused_in_pieces(compilations, monkeypatch):
    assert neuron.STEPS_A_KERNEL <= 16
    # Small pieces compile faster. Two, two and one step here.
    monkeypatch.setattr(neuron, "STEPS_A_KERNEL", 2)
    torch.manual_seed(0)
    x = (2 * torch.randn(5, 4, 50).double()).requires_grad_()
    gradient, results = torch.randn(5, 4, 50).double(), []
    for fuse in (True, False):
        monkeypatch.setattr(neuron, "COMPILE", fuse)
        layer = TrLIF(0.7, 3.0).double()
        for _ in range(2):
            layer.zero_grad()
            x.grad = None
            spikes = layer(x)
            spikes.backward(gradient)
            raw = layer.raw_threshold.grad, layer.raw_decay.grad
            results.append((spikes.detach(), x.grad, *raw, layer.v_init))
    for pieces, whole in zip(results[:2], results[2:]):
        torch.testing.assert_close(pieces, whole, rtol=1e-12, atol=1e-12)
    # The first piece, later ones and the rest; more pieces of these kinds need no more.
    assert compilations() <= 3
    monkeypatch.setattr(neuron, "COMPILE", True)
    TrLIF().double()(torch.randn(7, 4, 50).double().requires_grad_())
    assert compilations() <= 3


def plain_spikes(layer, x):
    return torch.stack(neuron.lif(x, layer.v_init, layer.threshold, layer.decay)[0])


def assert_still_fused(captures):
    """Each T is a graph of its own, unless the loop runs operation by operation."""
    before = captures()
    for T in (2, 3):
        TrLIF()(torch.randn(T, 3, 5))
    assert captures() == before + 2 and neuron.COMPILE and not neuron.FAILED


RECORDERS = {
    "jit": lambda layer, x: torch.jit.trace(layer, x),
    "make_fx": lambda layer, x: torch.fx.experimental.proxy_tensor.make_fx(layer)(x),
    "export": lambda layer, x: torch.export.export(layer, (x,)).module(),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("recorder", RECORDERS)
def test_the_layer_can_be_traced_and_fusing_stays_on(captures, recorder):
    layer, x = TrLIF().eval(), torch.randn(4, 16, 1024)
    recorded = RECORDERS[recorder](layer, x)
    assert torch.equal(recorded(x), plain_spikes(layer, x))
    assert_still_fused(captures)


def test_what_cannot_be_compiled_runs_plain_with_one_warning(captures, monkeypatch):
    run_compiled = neuron.run_compiled

    def broken(x, *arguments):
        if len(x) == 4:
            raise RuntimeError("no compiler here\nand much more")
        return run_compiled(x, *arguments)

    monkeypatch.setattr(neuron, "run_compiled", broken)
    layer, x = TrLIF().eval(), torch.randn(4, 7)
    with pytest.warns(UserWarning, match="no compiler here$") as caught:
        first, second = layer(x), layer(x)
    assert len(caught) == 1 and torch.equal(first, second)
    assert torch.equal(first, plain_spikes(layer, x))
    neuron.FAILED.clear()
    assert_still_fused(captures)


def test_errors_that_are_not_the_compilers_leave_the_fused_loop_on(captures):
    layer, x = TrLIF().eval(), torch.randn(3, 100)
    layer.v_init = torch.zeros((), device="meta")
    with pytest.raises(RuntimeError, match="meta"):
        layer(x)
    assert_still_fused(captures)


# What TrLIF's docstring says of limits.
@pytest.mark.parametrize("mode", ["plain", "fused"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_is_an_error_in_training_only(request, mode, reentrant):
    request.getfixturevalue(mode)
    torch.manual_seed(0)
    x = torch.randn(2, 100, requires_grad=True)
    spikes = checkpoint(TrLIF(), x, use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match="no torch.utils.checkpoint in training"):
        spikes.square().sum().backward()
    for layer in (TrLIF().eval(), TrLIF(mp_init="off")):
        layer.v_init += 0.2
        inputs, results = [x, layer.raw_threshold, layer.raw_decay], []
        for spikes in (layer(x), checkpoint(layer, x, use_reentrant=reentrant)):
            layer.zero_grad()
            x.grad = None
            spikes.square().sum().backward()
            results.append([value.grad.clone() for value in inputs])
        assert all(torch.equal(a, b) and a.any() for a, b in zip(*results))


def test_function_transforms_fail_and_fusing_stays_on(captures):
    for training in (True, False):
        layer, x = TrLIF().train(training), torch.randn(3, 5, 2)
        with pytest.raises(RuntimeError, match="functorch"):
            torch.func.grad(lambda x: layer(x).sum())(x)
        with pytest.raises(RuntimeError, match="functorch"):
            torch.func.vmap(layer, 2, 2)(x)
    assert_still_fused(captures)


def test_second_derivatives_equal_differences_of_first_ones():
    torch.manual_seed(0)
    x = (2 * torch.randn(3, 50).double()).requires_grad_()
    layer, weight = TrLIF().double().eval(), torch.randn(3, 50).double()

    def first(create_graph=False):
        loss = (weight * layer(x)).sum()
        return torch.autograd.grad(loss, x, create_graph=create_graph)[0].square().sum()

    second = torch.autograd.grad(first(create_graph=True), layer.raw_decay)[0].item()
    values = []
    for step in (1e-6, -2e-6):
        layer.raw_decay.data += step
        values.append(first().item())
    assert second == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-6) and second != 0


def test_second_derivatives_fail_fused(fused):
    x = torch.randn(2, 50, requires_grad=True)
    gradient = torch.autograd.grad(TrLIF()(x).sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.square().sum().backward()


@pytest.mark.filterwarnings("ignore")
def test_fully_sharded_training_takes_the_layer_with_its_scalars_ignored(tmp_path):
    start = dict(init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    torch.distributed.init_process_group("gloo", **start)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        shard = torch.distributed.fsdp.fully_shard
        with pytest.raises(ValueError, match="scalar parameters"):
            shard(TrLIF(), mesh=mesh)
        model = nn.Sequential(nn.Linear(4, 50), TrLIF())
        shard(model, mesh=mesh, ignored_params={model[1].raw_threshold, model[1].raw_decay})
        model(5 * torch.randn(3, 8, 4)).sum().backward()
        assert model[1].raw_threshold.grad != 0 and model[1].v_init != 0
    finally:
        torch.distributed.destroy_process_group()


def test_thresholds_underflow_where_the_docstring_says():
    def result(raw_threshold):
        layer = TrLIF()
        nn.init.constant_(layer.raw_threshold, raw_threshold)
        layer(torch.randn(3, 50)).sum().backward()
        return layer.threshold.item(), layer.raw_threshold.grad.isfinite().item()

    assert result(-88.0)[0] > 0 and result(-88.0)[1]
    # 1 / theta is infinite.
    assert result(-89.0)[0] > 0 and not result(-89.0)[1]
    assert result(-103.0)[0] > 0 and result(-104.0)[0] == 0


BAD_USE = [
    (lambda: TrLIF(threshold=0), "threshold must be above 0"),
    (lambda: TrLIF(threshold=float("nan")), "threshold must be above 0"),
    (lambda: TrLIF(tau=1), "tau must be above 1"),
    (lambda: TrLIF(surrogate="sigmoid"), "must be 'trsg' or 'absolute', not 'sigmoid'"),
    (lambda: TrLIF(mp_init="mean"), "mp_init must be"),
    (lambda: TrLIF(momentum=2), "momentum must be"),
    (lambda: TrLIF()(torch.ones(2, 3, dtype=torch.int64)), "floating-point"),
    (lambda: TrLIF()(torch.ones(3)), r"\[T, B, ...\]"),
    (lambda: TrLIF()(torch.ones(0, 3)), "T >= 1"),
    (lambda: TrLIF(check=True)(torch.tensor([[1.0, float("nan")]])), "NaN or infinity"),
]


@pytest.mark.parametrize("use, message", BAD_USE)
def test_bad_use_of_the_layer_is_explained_in_a_line(use, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        use()
    assert "\n" not in str(caught.value)


def test_the_file_works_without_its_second_part():
    method, speed = (HERE / "neuron.py").read_text().split("\n# ---- Speed")
    part = {}
    exec(method, part)
    part["COMPILE"] = False
    x, results = torch.randn(4, 3, 50, requires_grad=True), []
    for layer in (part["TrLIF"](), TrLIF()):
        x.grad = None
        spikes = layer(x)
        spikes.square().sum().backward()
        results.append((spikes, x.grad, layer.raw_threshold.grad, layer.v_init))
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*results))


# ---- models --------------------------------------------------------------------------------------


def neurons(model):
    return [module for module in model.modules() if isinstance(module, TrLIF)]


def weighted(model):
    return [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]


SIZES = [("resnet19", 100, 12_548_294, 17), ("resnet19", 10, 12_502_124, 17),
         ("resnet18", 1000, 11_689_546, 17), ("resnet34", 1000, 21_797_738, 33),
         ("sew_resnet18", 1000, 11_689_552, 20), ("sew_resnet34", 1000, 21_797_744, 36),
         ("spikformer", 10, 9_324_796, 33)]


@pytest.mark.parametrize("arch, classes, parameters, layers", SIZES)
def test_parameters_and_neurons(arch, classes, parameters, layers):
    model = models.build(arch, classes, timesteps=1)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(neurons(model)) == layers


def test_the_authors_trajectory_is_followed_to_rounding():
    """Five steps of SGD with the recipe of the paper, beside what the authors' code computes."""
    model = models.build("resnet19", 100, timesteps=2).double()
    rng = np.random.default_rng(11)
    for layer in weighted(model):
        bound = 1 / math.sqrt(layer.weight[0].numel())
        for parameter in layer.parameters():
            values = rng.uniform(-bound, bound, parameter.shape)
            parameter.data.copy_(torch.from_numpy(values))
    for layer in neurons(model):
        # Theta = 1 in float64.
        nn.init.constant_(layer.raw_threshold, math.log(math.expm1(1)))
    rng = np.random.default_rng(12)
    x = torch.from_numpy(rng.standard_normal((5, 4, 3, 16, 16)))
    y = torch.from_numpy(rng.integers(0, 100, (5, 4)))
    settings, _ = train.parse(["--arch", "resnet19", "--dataset", "cifar100"])
    optimizer, losses = train.make_optimizer(model, train.with_recipe(settings)), []
    for images, labels in zip(x, y):
        loss = F.cross_entropy(model(images).mean(0), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        logits = model.eval()(x[0])[..., :10]
    sums = [sum(layer.threshold.item() for layer in neurons(model))]
    sums += [sum(layer.tau.item() for layer in neurons(model))]
    sums += [sum(layer.v_init.item() for layer in neurons(model))]
    sums += [logits.sum().item(), logits.abs().sum().item()]
    sums += [sum(layer.weight.abs().sum().item() for layer in weighted(model))]
    authors_losses = [4.614303774543373, 4.619991159773048, 4.615590041590323]
    authors_losses += [4.621456400120524, 4.594801515525382]
    # Sums of theta, tau and v_init, of the logits and their sizes, of the sizes of weights.
    authors_sums = [17.003682175673116, 34.01675950947091, 2.8271501300654616]
    authors_sums += [0.0738711139737467, 1.540800553657308, 119422.77184386643]
    np.testing.assert_allclose(losses, authors_losses, rtol=1e-12)
    np.testing.assert_allclose(sums, authors_sums, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("arch", ["resnet19", "resnet18", "sew_resnet18"])
def test_weights_start_as_published(arch):
    torch.manual_seed(0)
    model = models.build(arch, 1000, timesteps=1, width=16)
    for layer in weighted(model):
        w, fan_in = layer.weight.detach(), layer.weight[0].numel()
        spread = 4 / math.sqrt(w.numel())
        if arch == "resnet19":
            # PyTorch's start: uniform up to 1 / sqrt(fan_in), whose deviation is sqrt(3) smaller.
            deviation = 1 / math.sqrt(3 * fan_in)
            assert w.abs().max() <= math.sqrt(3) * deviation * (1 + 1e-6)
        else:
            fan_out = w.shape[0] * w[0, 0].numel()
            deviation = 0.01 if layer is model.head else math.sqrt(2 / fan_out)
            # Normal: values beyond two deviations are not rare.
            assert (w.abs() > 2 * deviation).float().mean() > 0.03
        assert w.std().item() == pytest.approx(deviation, rel=spread)
    assert (model.head.bias != 0).all() if arch == "resnet19" else (model.head.bias == 0).all()


@pytest.mark.parametrize("arch", models.ARCHS)
@pytest.mark.parametrize("T, size", [(1, 28), (2, 32), (4, 48), (1, 224)])
def test_networks_run_forward_and_backward(arch, T, size):
    static = models.build(arch, 7, T, width=4)
    logits = static(torch.randn(2, 3, size, size))
    assert logits.shape == (T, 2, 7)
    logits.mean(0).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in static.parameters())
    events = models.build(arch, 7, 1, in_channels=2, width=4)
    assert events(torch.rand(2, T, 2, size, size)).shape == (T, 2, 7)


@pytest.mark.parametrize("arch", ["resnet19", "sew_resnet18", "spikformer"])
def test_a_static_image_equals_the_same_frame_at_every_step(arch):
    torch.manual_seed(0)
    model = models.build(arch, 5, 3, width=4).double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    frames = x[:, None].expand(-1, 3, -1, -1, -1)
    torch.testing.assert_close(model(x), model(frames), rtol=1e-12, atol=1e-12)


def test_attention_in_either_order_is_the_same():
    torch.manual_seed(0)
    layer = models.SpikingSelfAttention(24, 12, {}).double().eval()
    for module in layer.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.constant_(module.weight, 4.0)
    x, seen = torch.randint(0, 2, (2, 9, 24)).double(), []
    layer.lif.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    layer(x, 1)
    parts = (part(x, 1) for part in (layer.q, layer.k, layer.v))
    q, k, v = (spikes.unflatten(2, (12, 2)).transpose(1, 2) for spikes in parts)
    product = ((q @ k.transpose(2, 3)) * 0.125 @ v).transpose(1, 2).flatten(2)
    assert product.abs().sum() > 0
    torch.testing.assert_close(seen[0][0], product)


def test_compiling_the_network_changes_rounding_only(monkeypatch):
    """20 training steps in float64, fused or not: the same losses and starts of potentials."""

    def training(fuse):
        monkeypatch.setattr(neuron, "COMPILE", fuse)
        torch.manual_seed(0)
        # Small, because compiling takes its time.
        model = models.ResNet(models.Block, [(4, 1, 1)], 10, 2, 3, 4, {}).double()
        if fuse:
            models.compile_model(model, fullgraph=True)
        optimizer, losses = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), []
        for i in range(20):
            generator = torch.Generator().manual_seed(i)
            x = torch.randn(8, 3, 16, 16, generator=generator, dtype=torch.float64)
            loss = F.cross_entropy(model(x).mean(0), torch.arange(8))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, [layer.v_init.item() for layer in neurons(model)]

    (plain_losses, plain_starts), (losses, starts) = training(False), training(True)
    assert losses[-1] < losses[0] and all(starts)
    np.testing.assert_allclose(losses, plain_losses, rtol=1e-6)
    np.testing.assert_allclose(starts, plain_starts, rtol=1e-6)


@pytest.mark.parametrize("arch", ["resnet19", "sew_resnet18"])
@pytest.mark.parametrize("surrogate", ["trsg", "absolute"])
@pytest.mark.parametrize("c", [0.25, 4.0])
def test_scaled_currents_make_the_threshold_a_unit(arch, surrogate, c):
    """The lemma through a network: from threshold and BatchNorms at c TrSG does what it does
    from 1."""

    def spikes_and_gradients(threshold):
        torch.manual_seed(0)
        model = models.build(arch, 10, 3, width=4, threshold=threshold, surrogate=surrogate)
        model.double()
        models.scale_currents(model, threshold)
        if surrogate == "trsg":
            # The head reads theta s.
            model.head.weight.data /= threshold
        spikes = []
        for module in model.modules():
            if isinstance(module, TrLIF):
                # Exact in float64.
                nn.init.constant_(module.raw_threshold, math.log(math.expm1(threshold)))
                module.register_forward_hook(lambda m, i, o: spikes.append(o != 0))
            elif isinstance(module, nn.BatchNorm2d):
                # The only thing that knows a unit.
                module.eps = 1e-14
        logits = model(torch.randn(8, 3, 16, 16).double())
        F.cross_entropy(logits.mean(0), torch.arange(8)).backward()
        return spikes, [layer.weight.grad for layer in weighted(model)[:-1]]

    spikes, gradients = spikes_and_gradients(1.0)
    spikes_c, gradients_c = spikes_and_gradients(c)
    if surrogate == "trsg":
        assert len(spikes) >= 17 and all(map(torch.equal, spikes, spikes_c))
        for a, b in zip(gradients, gradients_c):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * a.abs().max())
    else:
        # The fixed window does notice.
        ratios = [(b.norm() / a.norm()).log().abs() for a, b in zip(gradients, gradients_c)]
        assert max(ratios) > 1


@pytest.mark.parametrize("arch", ["resnet19", "spikformer"])
def test_neurons_under_autocast_equal_the_oracle(arch):
    """Convolutions in bfloat16, as on a GPU: what arrives at neurons is integrated exactly."""
    torch.manual_seed(0)
    model = models.build(arch, 10, 3, width=8, threshold=0.37, tau=1.7)
    seen = {layer: {} for layer in neurons(model)}

    def watch(layer, inputs, spikes):
        seen[layer].update(x=inputs[0], spikes=spikes)
        inputs[0].register_hook(lambda g: seen[layer].update(gx=g))
        spikes.register_hook(lambda g: seen[layer].update(g=g))

    for layer in seen:
        layer.register_forward_hook(watch)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.randn(4, 3, 32, 32))
    F.cross_entropy(logits.float().mean(0), torch.arange(4)).backward()
    for layer, tensors in seen.items():
        assert tensors["x"].dtype == torch.bfloat16
        x, spikes, gx, g = (as_numpy(tensors[name]) for name in ("x", "spikes", "gx", "g"))
        theta, k = layer.threshold.item(), layer.decay.item()
        expected, _, _, expected_gx, _, _ = oracle(x, g, 0.0, theta, k, "trsg")
        np.testing.assert_allclose(spikes, expected, rtol=2**-8)
        assert_close(gx, expected_gx, 2e-2)
    active = [tensors["spikes"].count_nonzero() > 0 for tensors in seen.values()]
    assert sum(active) > len(seen) / 2


CANNOT_BE_BUILT = [
    (("alexnet", 10, 1), "unknown arch 'alexnet'"), (("resnet19", 0, 1), "num_classes"),
    (("resnet19", 10, 0), "timesteps"), (("spikformer", 10, 1, 3, 6), "multiple of 4")]


@pytest.mark.parametrize("arguments, message", CANNOT_BE_BUILT)
def test_networks_that_cannot_be_built(arguments, message):
    with pytest.raises(ValueError, match=message):
        models.build(*arguments)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("arch", ["resnet19", "spikformer"])
def test_folded_networks_can_be_exported_for_any_batch_size(arch):
    torch.manual_seed(0)
    # Low thresholds: something has to fire in front of the head.
    model = models.build(arch, 10, 2, width=4, threshold=0.2)
    for _ in range(30):
        model(torch.randn(8, 3, 16, 16))
    folded, x = models.fold(model), torch.randn(4, 3, 16, 16)
    batch = {0: torch.export.Dim("batch")}
    with torch.no_grad():
        exported = torch.export.export(folded, (x,), dynamic_shapes=(batch,)).module()
        for n in (2, 4, 7):
            x = torch.randn(n, 3, 16, 16)
            logits = exported(x)
            torch.testing.assert_close(logits, model.eval()(x), rtol=1e-4, atol=1e-5)
            assert torch.equal(logits, folded(x)) and (logits - logits[:, :1]).any()


# The layer in other people's networks.
@pytest.mark.filterwarnings("ignore")
def test_spikingjellys_networks_take_the_layer():
    library = "spikingjelly.activation_based"
    functional = pytest.importorskip(f"{library}.functional")
    resnet = pytest.importorskip(f"{library}.model.spiking_resnet").spiking_resnet18
    sew_resnet = pytest.importorskip(f"{library}.model.sew_resnet").sew_resnet18
    for build, options in ((resnet, {}), (sew_resnet, dict(cnf="ADD"))):
        network = build(spiking_neuron=TrLIF, num_classes=10, **options)
        functional.set_step_mode(network, "m")
        network(torch.randn(2, 4, 3, 32, 32)).square().sum().backward()
        assert len(neurons(network)) >= 17
        assert all(n.v_init != 0 and n.raw_threshold.grad.any() for n in neurons(network))


def test_batch_first_and_step_by_step_code_take_the_layer():
    torch.manual_seed(0)
    layer, linear, x = TrLIF().double(), nn.Linear(7, 50).double(), torch.randn(3, 4, 7).double()
    k, theta = layer.decay.item(), layer.threshold.item()
    current = as_numpy(linear(x))
    expected = oracle(current, current, 0.0, theta, k, "trsg")[0]
    # Code that has [B, T, ...].
    batch_first = layer(linear(x.transpose(0, 1)).transpose(0, 1)).transpose(0, 1)
    assert_close(as_numpy(batch_first.transpose(0, 1)), expected, 1e-12)
    # Code that goes step by step: first the currents of all steps, then the neurons.
    layer.v_init.zero_()
    spikes = layer(torch.stack([linear(x_t) for x_t in x]))
    assert_close(as_numpy(spikes), expected, 1e-12)


# ---- on a GPU (-k cuda) --------------------------------------------------------------------------

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@cuda
@pytest.mark.parametrize("layout", [lambda x: x, channels_last], ids=["contiguous", "nhwc"])
@pytest.mark.parametrize("dtype, tolerance", DTYPES[1:])
def test_cuda_layer_equals_the_oracle(fused, dtype, tolerance, layout):
    check_against_oracle(TrLIF().cuda(), 4, dtype, tolerance, (16, 8, 9, 9), layout)


def cuda_step(monkeypatch, fuse, dtype):
    """(all gradients, those of the thresholds, peak bytes) of a step of resnet19. float32 means
    no TF32; bfloat16 is autocast."""
    monkeypatch.setattr(neuron, "COMPILE", fuse)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = models.build("resnet19", 10, 4, width=32)
    model = model.to("cuda", torch.float64 if dtype == torch.float64 else torch.float32)
    model.to(memory_format=torch.channels_last)
    if fuse:
        models.compile_model(model, fullgraph=True)
    x = torch.randn(64, 3, 32, 32).to("cuda", next(model.parameters()).dtype)
    # The first step starts v_init and compiles; the second counts.
    for _ in range(2):
        model.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(x).double().mean(0)
        F.cross_entropy(logits, torch.arange(64, device="cuda") % 10).backward()
    gradients = torch.cat([p.grad.double().flatten() for p in model.parameters()])
    thresholds = torch.stack([layer.raw_threshold.grad.double() for layer in neurons(model)])
    return gradients, thresholds, torch.cuda.max_memory_allocated()


@cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_compiled_step_is_as_exact_as_a_plain_one_in_less_memory(monkeypatch, dtype):
    """Rounding flips spikes, so the two differ: measure both against one with more digits."""
    more_digits = torch.float64 if dtype == torch.float32 else torch.float32
    *expected, _ = cuda_step(monkeypatch, False, more_digits)
    *unfused, bytes_unfused = cuda_step(monkeypatch, False, dtype)
    *fused, bytes_fused = cuda_step(monkeypatch, True, dtype)
    # All gradients, then those of the thresholds.
    for right, one_by_one, compiled in zip(expected, unfused, fused):
        error, error_compiled = (one_by_one - right).norm(), (compiled - right).norm()
        assert error_compiled <= 1.5 * error + 1e-5 * right.norm()
    assert bytes_fused <= 0.85 * bytes_unfused


@cuda
def test_cuda_steps_do_not_wait():
    flags = "--width 8 --timesteps 2 --amp --device cuda".split()
    args = train.with_recipe(train.parse(flags)[0])
    model = models.compile_model(models.build("resnet19", 10, 2, width=8).cuda(), fullgraph=True)
    optimizer = train.make_optimizer(model, args)
    scaler = torch.amp.GradScaler("cuda", init_scale=1.0, growth_interval=2**30)
    x, y = torch.randn(64, 3, 32, 32, device="cuda"), torch.arange(64, device="cuda") % 10

    def step(i):
        return train.train_step(model, train.score, optimizer, scaler, x, y, args, (0, 0, i))

    totals = [step(i) for i in range(3)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        totals += [step(i) for i in range(10)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(totals).isfinite().all()


# ---- data ----------------------------------------------------------------------------------------

def test_shapes_need_more_than_a_linear_classifier():
    torch.manual_seed(0)
    (x, y), (x_test, y_test) = (
        (torch.from_numpy(images).flatten(1).float() / 128 - 1, torch.from_numpy(labels).long())
        for images, labels in (data.draw_shapes(4000, 1), data.draw_shapes(1000, 2)))
    linear = nn.Linear(x.shape[1], 10)
    optimizer = torch.optim.Adam(linear.parameters(), 1e-3)
    for _ in range(20):
        for i in torch.randperm(len(x)).split(100):
            optimizer.zero_grad()
            F.cross_entropy(linear(x[i]), y[i]).backward()
            optimizer.step()
    # It did learn what it can.
    assert (linear(x).argmax(1) == y).float().mean() > 0.4
    assert (linear(x_test).argmax(1) == y_test).float().mean() < 0.6


def test_shapes_are_reproducible_and_balanced_at_every_size():
    small = data.load("shapes", image_size=16)
    assert small.size == (16, 16) and small.pad == 2
    (a, labels_a), (b, labels_b) = (data.draw_shapes(200, 2, size) for size in (32, 64))
    assert np.array_equal(a, data.draw_shapes(200, 2)[0])
    assert not np.array_equal(a, data.draw_shapes(200, 1)[0])
    assert np.bincount(labels_a).tolist() == [20] * 10
    # The same shapes at the same places, drawn finer.
    assert np.array_equal(labels_a, labels_b)
    means = b.reshape(200, 32, 2, 32, 2, 3).mean((2, 4))
    assert np.corrcoef(a.ravel(), means.ravel())[0, 1] > 0.95
    with pytest.raises(data.UserError, match="up to 96, not 97"):
        data.load("shapes", image_size=97)


def small_set(n=100, n_test=37, pad=4, flip=True):
    rng = np.random.default_rng(0)
    sets = [(rng.integers(0, 256, (m, 32, 32, 3), dtype=np.uint8), np.arange(m) % 10)
            for m in (n, n_test)]
    return data.Resident("small", *sets, [*"abcdefghij"], [0.0] * 3, [1 / 255] * 3, pad, flip)


def test_augmentation_is_a_shift_and_flip_of_each_image():
    dataset = small_set()
    padded = np.pad(dataset.sets["train"][0].numpy(), ((0, 0), (4, 4), (4, 4), (0, 0)))
    crops = {}
    for dy, dx, mirror in np.ndindex(9, 9, 2):
        part = padded[:, dy:dy + 32, dx:dx + 32]
        for i, image in enumerate(part[:, :, ::-1] if mirror else part):
            crops[np.ascontiguousarray(image).tobytes()] = i, (dy, dx, mirror)
    x, y = next(dataset.train(100, seed=3, epoch=0))
    # Every output is one of the possible crops.
    found = [crops[image.byte().permute(1, 2, 0).contiguous().numpy().tobytes()] for image in x]
    assert sorted(i for i, _ in found) == list(range(100)) and len({how for _, how in found}) > 60
    assert y.tolist() == [i % 10 for i, _ in found]


def test_frames_of_a_recording_move_together_and_digits_are_not_mirrored():
    frames = np.zeros((40, 3, 2, 34, 34), np.uint8)
    frames[:, :, :, 17, 10] = np.arange(1, 7).reshape(3, 2)
    both = [(frames, np.zeros(40))] * 2
    dataset = data.Resident("n", *both, ["0"], (0.0, 0.0), (1 / 255,) * 2, pad=5, flip=False)
    x, _ = next(dataset.train(40, 0, 0))
    assert x.shape == (40, 3, 2, 34, 34) and dataset.frames == 3 and dataset.channels == 2
    places = set()
    for recording in x:
        _, _, row, column = recording.nonzero().T
        assert len(row) == 6 and len(row.unique()) == len(column.unique()) == 1
        assert recording.amax((2, 3)).flatten().tolist() == [1, 2, 3, 4, 5, 6]
        places.add((row[0].item(), column[0].item()))
    assert all(abs(r - 17) <= 5 and abs(c - 10) <= 5 for r, c in places) and len(places) > 10
    assert next(dataset.test(40))[0][0, :, :, 17, 10].flatten().tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("augment", [False, True])
def test_batches_do_not_depend_on_history_or_on_the_number_of_processes(augment):
    dataset = small_set()
    dataset.augment = augment
    whole = list(dataset.train(20, 1, 2))
    assert len(whole) == 5
    for (xa, ya), (xb, yb) in zip(whole[3:], dataset.train(20, 1, 2, start=3), strict=True):
        assert torch.equal(xa, xb) and torch.equal(ya, yb)
    parts = [dataset.train(20, 1, 2, 0, rank, 2) for rank in (0, 1)]
    for (x, y), (x0, y0), (x1, y1) in zip(whole, *parts, strict=True):
        assert torch.equal(x[::2], x0) and torch.equal(x[1::2], x1)
        assert torch.equal(y[::2], y0) and torch.equal(y[1::2], y1)
    assert not torch.equal(whole[0][0], next(dataset.train(20, 1, 3))[0])


@pytest.mark.parametrize("world, batch", [(1, 10), (2, 10), (3, 7), (4, 64)])
def test_every_test_image_is_seen_once(world, batch):
    dataset = small_set()
    images, labels = dataset.sets["test"]
    parts = [list(dataset.test(batch, rank, world)) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    assert all(len(y) == batch for part in parts for _, y in part)
    seen = [(image.sum().item(), label.item()) for part in parts for x, y in part
            for image, label in zip(x, y) if label >= 0]
    sums = images.float().sum((1, 2, 3))
    assert sorted(seen) == sorted(zip(sums.tolist(), labels.tolist()))


def test_trivial_augment_draws_for_parts_of_the_batch_and_leaves_the_global_generator_alone():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (64, 32, 32, 3), dtype=torch.uint8, generator=generator)
    before = torch.get_rng_state()
    a, b, other = (data.trivial_augment(images.clone(), 64, 0, 1, key)
                   for key in ((0, 0), (0, 0), (0, 1)))
    assert torch.equal(before, torch.get_rng_state()) and a.dtype == torch.uint8
    assert torch.equal(a, b) and not torch.equal(a, other)
    # Four images share an operation; some operations change nothing.
    changed = (a != images).flatten(1).any(1).view(16, 4)
    assert 8 <= changed.any(1).sum() <= 16
    # 21 images do not divide by 16.
    whole = data.trivial_augment(images[:21].clone(), 21, 0, 1, (3,))
    for rank in (0, 1):
        part = data.trivial_augment(images[rank:21:2].clone(), 21, rank, 2, (3,))
        assert torch.equal(whole[rank::2], part)


def test_cutout_blanks_a_square_to_the_mean():
    dataset = small_set(pad=0, flip=False)
    dataset.cutout = 8
    x, _ = next(dataset.train(100, 0, 0))
    blank = (x == 0).all(1).flatten(1).sum(1)
    assert blank.max() == 64 and blank.min() >= 16 and blank.float().std() > 0


def image_tree(root, sizes=((40, 50), (64, 64)), n=3, modes=("RGB", "L", "RGBA", "P")):
    """cats are dark, dogs are bright."""
    rng = np.random.default_rng(0)
    for split, (c, name) in ((s, c) for s in ("train", "val") for c in enumerate(("cats", "dogs"))):
        (root / split / name).mkdir(parents=True)
        for i in range(n * len(modes)):
            mode = modes[i % len(modes)]
            pixels = rng.integers(0, 80, (*sizes[i % len(sizes)], 3)) + 150 * c
            ending = "webp" if i % 2 and mode != "P" else "png"
            image = Image.fromarray(pixels.astype(np.uint8)).convert(mode)
            image.save(root / split / name / f"{i}.{ending}")
    return root


def test_cifar_is_downloaded_once_and_prepared(tmp_path, monkeypatch):
    """The original's format, an archive of pickled dicts of planes, from a server here."""
    folder, sums = tmp_path / "served/cifar-100-python", {}
    folder.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), dtype=np.uint8)
    planes, labels = images.transpose(0, 3, 1, 2).reshape(7, -1), [0, 99, 3, 4, 5, 6, 7]
    for name, content in (("train", {"data": planes, "fine_labels": labels}),
                          ("test", {"data": planes[:2], "fine_labels": labels[:2]}),
                          ("meta", {"fine_label_names": [str(c) for c in range(100)]})):
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    packed = shutil.make_archive(str(folder), "gztar", folder.parent, folder.name)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder.parent)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    url = f"http://127.0.0.1:{server.server_port}/cifar-100-python.tar.gz"
    original = torchvision.datasets.CIFAR100
    for key, value in dict(
            url=url, tgz_md5=hashlib.md5(pathlib.Path(packed).read_bytes()).hexdigest(),
            train_list=[["train", sums["train"]]], test_list=[["test", sums["test"]]],
            meta={"filename": "meta", "key": "fine_label_names", "md5": sums["meta"]}).items():
        monkeypatch.setattr(original, key, value)
    data.load("cifar100", tmp_path / "data")
    # The prepared arrays alone serve.
    shutil.rmtree(tmp_path / "data/cifar-100-python")
    monkeypatch.setattr(original, "url", url.replace("cifar", "nowhere"))
    dataset = data.load("cifar100", tmp_path / "data")
    x, y = next(dataset.test(2))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (dataset.mean, dataset.std))
    torch.testing.assert_close(x, (torch.tensor(images[:2]).permute(0, 3, 1, 2) / 255 - mean) / std)
    assert y.tolist() == [0, 99] and len(dataset) == 7
    message = r"^cifar100 is not in [^\n]* cannot be downloaded [^\n]*nowhere[^\n]*$"
    with pytest.raises(data.UserError, match=message):
        data.load("cifar100", tmp_path / "other")
    server.shutdown()


@pytest.mark.parametrize("size", [24, 112])
def test_a_folder_of_images_of_every_mode(tmp_path, size):
    dataset = data.load("folder", image_tree(tmp_path), image_size=size, workers=1).to("cpu")
    assert isinstance(dataset, data.Resident if size == 24 else data.Streamed)
    assert dataset.classes == ["cats", "dogs"]
    batches = list(dataset.train(8, 0, 0))
    assert len(batches) == 3
    assert all(x.shape == (8, 3, size, size) and x.isfinite().all() for x, _ in batches)
    # Class 1 is the bright one.
    assert all(((x.mean((1, 2, 3)) > 0) == (y == 1)).float().mean() > 0.7 for x, y in batches)
    again = list(dataset.train(8, 0, 0, start=1, rank=1, world=2))
    assert len(again) == 2 and torch.equal(again[0][0], batches[1][0][1::2])
    assert torch.equal(again[1][1], batches[2][1][1::2])
    if size == 24:
        # What it is normalised with: of all training pixels.
        pixels = dataset.sets["train"][0].reshape(-1, 3).double().numpy() / 255
        expected = [pixels.mean(0), pixels.std(0)]
        np.testing.assert_allclose([dataset.mean, dataset.std], expected, rtol=1e-9)
    labels = torch.cat([y for _, y in dataset.test(10)])
    assert len(labels) == 30 and (labels == 0).sum() == (labels == 1).sum() == 12


@pytest.mark.parametrize("size", [24, 112])
def test_the_first_classes_and_some_images_alone(tmp_path, size):
    dataset = data.load("folder", image_tree(tmp_path), image_size=size, workers=0).to("cpu")
    with pytest.raises(data.UserError, match="--classes 3 is more than the 2 classes of folder"):
        dataset.keep_classes(3)
    dataset.keep_classes(1)
    assert dataset.classes == ["cats"] and len(dataset) == 12
    seen = [y for part in (dataset.train(4, 0, 0), dataset.test(5)) for _, y in part]
    assert len(seen) == 6 and torch.cat(seen).sort().values.tolist() == [-1] * 3 + [0] * 24
    with pytest.raises(data.UserError, match="--limit 13 is more than the 12 training images"):
        dataset.limit(13)
    dataset.limit(5)
    assert len(dataset) == 5 and len(list(dataset.train(2, 0, 0))) == 2


@pytest.mark.parametrize("size", [16, 112])
def test_hidden_files_are_no_images_and_a_flat_test_folder_no_test_set(tmp_path, size):
    image_tree(tmp_path, n=1)
    # What macOS, Jupyter and the usual preparation of ImageNet leave behind.
    (tmp_path / "train/cats/._0.png").write_bytes(b"\0\5\26\7")
    for place in ("train", "train/dogs", "val"):
        shutil.copytree(tmp_path / "train/cats", tmp_path / place / ".ipynb_checkpoints")
    (tmp_path / "test").mkdir()
    shutil.copy(tmp_path / "val/cats/0.png", tmp_path / "test/ILSVRC2012_test_1.png")
    dataset = data.load("folder", tmp_path, image_size=size, workers=0)
    assert dataset.classes == ["cats", "dogs"] and len(dataset) == 8
    assert next(dataset.test(8))[1].tolist() == [0] * 4 + [1] * 4


@pytest.mark.parametrize("pixels, ending", [(np.full((20, 20), 3000, np.uint16), "png"),
                                            (np.full((20, 20), 0.5, np.float32), "tiff"),
                                            (np.full((20, 20), 70000, np.int32), "tiff")])
def test_images_of_more_than_8_bits_are_refused(tmp_path, pixels, ending):
    Image.fromarray(pixels).save(image_tree(tmp_path) / f"train/cats/deep.{ending}")
    with pytest.raises(data.UserError, match=rf"deep.{ending}: .*more than 8 bits[^\n]*$"):
        data.load("folder", tmp_path, image_size=16, workers=1)


def test_files_are_replaced_whole_or_not_at_all(tmp_path):
    def half(file):
        file.write(b"half")
        raise OSError("disk full")
    data.write_atomically(tmp_path / "a/b", lambda file: file.write(b"old"))
    with pytest.raises(data.UserError, match="^cannot write .*b: disk full$"):
        data.write_atomically(tmp_path / "a/b", half)
    assert [(p.name, p.read_bytes()) for p in (tmp_path / "a").iterdir()] == [("b", b"old")]


# ---- events --------------------------------------------------------------------------------------

HEADER = b"#!AER-DAT2.0\r\n# This is a raw AE data file\r\n# Timestamps tick: 1 us\r\n"
RECORDINGS = sorted(pathlib.Path(os.environ.get("DVS_RECORDINGS", "/nowhere")).glob("*.aedat"))


def slow_read(path):
    """An AEDAT 2.0 recording one event at a time, from the format's description: t, x, y, p."""
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
    return header + b"".join(struct.pack(">II", int(address), int(t) % 2 ** 32)
                             for address, t in zip(addresses, times, strict=True))


def recording_of(seed, n=2000):
    rng = np.random.default_rng(seed)
    return pack(rng.integers(0, 2 ** 15, n), np.sort(rng.integers(0, 10 ** 6, n)))


def write_set(folder, numbers, inside="{c}", n=300):
    """Recordings of the ten classes, by default in class folders."""
    for c in data.CIFAR10:
        place = folder / inside.format(c=c)
        place.mkdir(parents=True, exist_ok=True)
        for i in numbers:
            (place / f"cifar10_{c}_{i}.aedat").write_bytes(recording_of((len(c), ord(c[0]), i), n))


CLOCKS = {
    "rising": np.sort(np.random.default_rng(0).integers(0, 10 ** 6, 997)),
    "empty slices": np.r_[np.arange(500), 10 ** 6 + np.arange(497)],
    "equal": np.full(997, 5),
    "wraps": 2 ** 32 - 500 + 2 * np.arange(997),
    "less time than slices": np.arange(997) // 200,
    "fewer events than slices": np.array([7, 9, 9]),
    "set back": np.r_[np.arange(1000, 1500), np.arange(900, 1397)],
}


@pytest.mark.parametrize("case", [*CLOCKS, *map(str, RECORDINGS)])
def test_events_and_frames_equal_a_slow_reader_and_binner(case, tmp_path):
    path = pathlib.Path(case)
    if case in CLOCKS:
        path = tmp_path / "a.aedat"
        addresses = np.random.default_rng(1).integers(0, 2 ** 15, len(CLOCKS[case]))
        path.write_bytes(pack(addresses, CLOCKS[case]))
    expected, found = slow_read(path), data.read_aedat(path)
    assert [v.dtype for v in found] == [np.int64] + [np.int16] * 3
    assert all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))
    for by in ("count", "time"):
        for frames in (1, 4, 10):
            result = data.bin_events(*found, frames=frames, height=128, width=128, by=by)
            assert result.dtype == np.uint16
            assert np.array_equal(result, slow_bin(*expected, frames, 128, 128, by))


def test_header_ends_where_the_number_sign_does_and_bits_are_where_they_belong(tmp_path):
    path = tmp_path / "text.aedat"
    # Bytes of events that look like text.
    stamps = [int.from_bytes(text) for text in (b"#abc", b"\n#hi", b"x\r\n#")]
    path.write_bytes(pack([0x410A, 0x2323, 0x0A23], stamps))
    t, x, y, p = (value.tolist() for value in data.read_aedat(path))
    assert (t, x, y, p) == (stamps, [62, 92, 117], [122, 110, 110], [1, 0, 0])
    path.write_bytes(pack([0, 1, 2, 0xFE, 0x100, 0x7F00], range(6)))
    t, x, y, p = (value.tolist() for value in data.read_aedat(path))
    assert x == [127, 127, 127, 127, 126, 0] and y == [127, 127, 126, 0, 127, 127]
    assert p == [1, 0, 1, 1, 1, 1] and t == list(range(6))


@pytest.mark.parametrize("bits", [0x8000, 0x9234])
def test_external_triggers_are_no_events(tmp_path, bits):
    rng = np.random.default_rng(0)
    addresses, times = rng.integers(0, 2 ** 15, 500), np.arange(500) * 10
    (tmp_path / "whole.aedat").write_bytes(pack(np.delete(addresses, 250), np.delete(times, 250)))
    # Bit 15 marks it, whatever the other bits are.
    addresses[250] = bits
    (tmp_path / "trigger.aedat").write_bytes(pack(addresses, times))
    found, expected = (data.read_aedat(tmp_path / f"{n}.aedat") for n in ("trigger", "whole"))
    assert len(found[0]) == 499 and all(np.array_equal(a, b) for a, b in zip(found, expected))


def test_reading_gives_back_what_was_written(tmp_path):
    rng = np.random.default_rng(2)
    places = (rng.integers(0, high, 500) for high in (128, 128, 2))
    events = np.sort(rng.integers(0, 9999, 500)), *places
    data.write_aedat(tmp_path / "a.aedat", *events)
    assert all(np.array_equal(a, b) for a, b in zip(events, data.read_aedat(tmp_path / "a.aedat")))


def test_bin_events_saturates_and_refuses_what_lies_outside():
    many, none = np.zeros(70000, np.int64), np.zeros(0, np.int64)
    assert data.bin_events(many, many, many, many, 1, 2, 2)[0, 0, 0, 0] == 65535
    assert not data.bin_events(none, none, none, none, 3, 2, 2, "time").any()
    one, two = np.array([1]), np.array([2])
    for x, y, p in ((two, one, one), (one, two, one), (one, one, two), (-one, one, one)):
        with pytest.raises(ValueError, match="outside"):
            data.bin_events(one, x, y, p, 1, 2, 2)
    for frames, by in ((0, "count"), (1, "number")):
        with pytest.raises(ValueError):
            data.bin_events(one, one, one, one, frames, 2, 2, by)


def test_nmnist_events_equal_a_slow_reader(tmp_path):
    raw = np.random.default_rng(3).integers(0, 256, (400, 5))
    raw[:, :2] %= 34
    # The mark of a clock that has run over.
    raw[[100, 101, 300], 1] = 240
    (tmp_path / "1.bin").write_bytes(raw.astype(np.uint8).tobytes())
    expected, later = [], 0
    for x, y, c, d, e in raw.tolist():
        later += 8192 if y == 240 else 0
        if y != 240:
            expected.append((((c % 128 * 256 + d) * 256 + e) + later, x, y, c // 128))
    assert np.array_equal(np.stack(data.read_nmnist(tmp_path / "1.bin"), 1), expected)
    assert len(expected) == 397 and later == 3 * 2 ** 13


@pytest.mark.parametrize("n, size", [(128, 48), (128, 32), (34, 34), (5, 3)])
def test_area_mean_equals_splitting_every_pixel(n, size):
    frames = np.random.default_rng(4).integers(0, 60, (3, 2, n, n))
    # Areas are whole numbers of such parts.
    cuts = size // math.gcd(n, size)
    side = n * cuts // size
    fine = frames.repeat(cuts, 2).repeat(cuts, 3).reshape(3, 2, size, side, size, side)
    assert np.allclose(data.area_mean(frames, size), fine.mean((3, 5)), atol=1e-4)


@pytest.mark.parametrize("read, raw", [
    (data.read_aedat, b""), (data.read_aedat, HEADER), (data.read_aedat, HEADER + b"# no end"),
    (data.read_aedat, recording_of(0)[:-3]), (data.read_aedat, b"PK\x03\x04" + bytes(60)),
    (data.read_aedat, b"RIFF" + bytes(60)), (data.read_aedat, b"#!AER-DAT3.1\r\n" + bytes(80)),
    (data.read_aedat, pack([5, 0x10001], [1, 2])), (data.read_aedat, pack([5, 0x18000], [1, 2])),
    (data.read_aedat, pack([0x8000], [1])), (data.read_nmnist, bytes([0, 240, 0, 0, 0])),
    (data.read_nmnist, b""), (data.read_nmnist, bytes(7)), (data.read_nmnist, b"PK\x03\x04\x05"),
    (data.read_nmnist, bytes([34, 0, 0, 0, 0])), (data.read_nmnist, bytes([0, 34, 0, 0, 0]))])
def test_bad_recordings_give_one_line_with_the_name(read, raw, tmp_path):
    (tmp_path / "bad one.bin").write_bytes(raw)
    with pytest.raises(data.UserError, match=r"^[^\n]*bad one.bin[^\n]*replace it[^\n]*$"):
        read(tmp_path / "bad one.bin")


def zip_class(folder, c, out):
    with zipfile.ZipFile(out / f"{c}.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr(f"__MACOSX/{c}/._cifar10_{c}_0.aedat", "no recording")
        for path in (folder / c).iterdir():
            packed.write(path, f"{c}/{path.name}")


def equal_sets(a, b):
    return all(torch.equal(u, v) for s in ("train", "test") for u, v in zip(a.sets[s], b.sets[s]))


def test_folders_and_zip_files_give_the_same_arrays_wherever_they_lie(tmp_path):
    write_set(tmp_path / "a/cifar10-dvs", (0, 1, 100))
    write_set(tmp_path / "c/cifar10-dvs", (0, 1, 100), inside="{c}/{c}")
    write_set(tmp_path / "d/cifar10-dvs", (0, 1, 100), inside="bird/extract/{c}")
    (tmp_path / "b/cifar10-dvs").mkdir(parents=True)
    for c in data.CIFAR10:
        zip_class(tmp_path / "a/cifar10-dvs", c, tmp_path / "b/cifar10-dvs")
    a, b, c, d = (data.load("cifar10-dvs", tmp_path / x, workers=x == "b") for x in "abcd")
    assert a.split == "first100" and a.classes == data.CIFAR10 and a.size == (48, 48)
    assert a.sets["train"][1].tolist() == list(range(10)) and len(a.sets["test"][1]) == 20
    assert equal_sets(a, b) and equal_sets(a, c) and equal_sets(a, d)
    recording = tmp_path / "a/cifar10-dvs/cat/cifar10_cat_100.aedat"
    frames = data.bin_events(*data.read_aedat(recording), 4, 128, 128)
    expected = frames.repeat(3, 2).repeat(3, 3).reshape(4, 2, 48, 8, 48, 8).mean((3, 5))
    # In events per pixel: the frames as prepared, and as the network gets them.
    seen = b.sets["train"][0][3].permute(2, 0, 1).reshape(4, 2, 48, 48) / 16.0
    assert abs(seen.numpy() - expected).max() <= 0.5 / 16 + 1e-6 and next(b.test(20))[0].max() < 16
    names = sorted(path.name for path in (tmp_path / "a/cifar10-dvs").glob("*.npy"))
    assert names == [f"{part}_{kind}_T4_count_48_first100.npy"
                     for part in ("test", "train") for kind in ("images", "labels")]


def test_recordings_that_lie_there_twice_are_refused(tmp_path):
    write_set(tmp_path / "cifar10-dvs", (0, 1, 100))
    write_set(tmp_path / "cifar10-dvs", (0, 1, 100), inside="again/{c}")
    with pytest.raises(data.UserError, match=r"airplane_0.aedat are one recording, delete one$"):
        data.load("cifar10-dvs", tmp_path, workers=0)


def test_nmnist_is_found_in_folders_of_folders(tmp_path):
    for part, digit in ((part, digit) for part in ("Train", "Test") for digit in range(10)):
        folder = tmp_path / "nmnist" / part / part / str(digit)
        folder.mkdir(parents=True)
        (folder / "1.bin").write_bytes(bytes([digit, 2, 128, 0, 0]) * (1 if part == "Test" else 2))
    dataset = data.load("nmnist", tmp_path, timesteps=1, workers=0)
    assert dataset.split == "official" and not dataset.flip and len(dataset) == 10
    x, y = next(dataset.test(10))
    assert y.tolist() == list(range(10)) and all(x[i, 0, 1, 2, i] == 1 for i in range(10))


def test_an_interrupted_unpacking_is_noticed(tmp_path, monkeypatch):
    folder = tmp_path / "cifar10-dvs"
    write_set(folder, (0, 1, 100, 101))
    zip_class(folder, "cat", folder)
    (folder / "cat/cifar10_cat_101.aedat").unlink()
    with pytest.raises(data.UserError, match="cat.zip cannot be unpacked: only 3 of its 4 record"):
        data.load("cifar10-dvs", tmp_path, workers=0)
    # One of the program's own starts again.
    shutil.rmtree(folder / "cat")
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        def interrupted(archive, place, members):
            archive.extract(members[0], place)
            raise KeyboardInterrupt
        m.setattr(zipfile.ZipFile, "extractall", interrupted)
        data.load("cifar10-dvs", tmp_path, workers=0)
    assert not (folder / "cat").exists()
    assert len(data.load("cifar10-dvs", tmp_path, workers=0)) == 20


def test_frames_are_made_again_where_recordings_have_changed(tmp_path, capsys):
    load = functools.partial(data.load, "cifar10-dvs", tmp_path, timesteps=2, workers=0)
    write_set(tmp_path / "cifar10-dvs", (0, 100))
    assert len(load()) == 10
    write_set(tmp_path / "cifar10-dvs", range(101, 111))
    more = load()
    assert len(more) == 110 and capsys.readouterr().out.count("making frames again") == 1
    # Others of the same names.
    write_set(tmp_path / "cifar10-dvs", (0, *range(100, 111)), n=301)
    others = load()
    assert capsys.readouterr().out.count("making frames again") == 1
    assert not equal_sets(more, others)
    # The same as before, and none at all.
    assert equal_sets(load(), others)
    for c in data.CIFAR10:
        shutil.rmtree(tmp_path / "cifar10-dvs" / c)
    assert equal_sets(load(), others) and capsys.readouterr().out == ""


@pytest.mark.parametrize("t, says", [
    (np.arange(500) * 100, False),
    # Set back in the middle; events left over from before; a wrap is neither.
    (np.r_[np.arange(250), np.arange(250)] * 100, True),
    (np.r_[9 * 10 ** 6 + np.arange(10), np.arange(490) * 100], True),
    (np.r_[np.arange(10), 9 * 10 ** 6 + np.arange(490) * 100], True),
    (2 ** 32 - 2500 + np.arange(500) * 100, False)])
def test_a_clock_that_jumps_gives_a_warning_with_the_name(t, says, tmp_path):
    (tmp_path / "a.aedat").write_bytes(pack(np.arange(500), t))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for by in ("count", "time"):
            assert data.Recordings("cifar10-dvs", [tmp_path / "a.aedat"], 4, by)[0].any()
    assert ["a.aedat: its clock jumps" in str(w.message) for w in caught] == [True] * says


def test_splits():
    recordings = [(c, i, f"{c}_{i}", 0, 0) for c in range(10) for i in range(1000)]
    number, label = np.tile(np.arange(1000), 10), np.arange(10).repeat(1000)
    first, drawn, again = (data.test_part(recordings, s) for s in ("first100", "random", "random"))
    assert np.array_equal(first, number < 100)
    assert np.array_equal(drawn, again) and not np.array_equal(drawn, first)
    assert np.bincount(label[drawn]).tolist() == [100] * 10
    assert len({tuple(number[drawn & (label == c)]) for c in range(10)}) == 10
    recordings = [(7, 1, f"{part}/{part}/7/1.bin", 0, 0) for part in ("Train", "Test")]
    assert data.test_part(recordings, "official").tolist() == [False, True]


@pytest.mark.parametrize("fault, text", [
    ("none", "cifar10-dvs has no recordings of class airplane.*figshare"),
    ("class", "no recordings of class horse"), ("zip", "horse.zip cannot be unpacked"),
    ("file", "cat_1.aedat .*ends in the middle"), ("address", "dog_1.aedat holds .* 0x12345"),
    ("split", "first100 makes 20 of 20"), ("name", "unknown split 'last'")])
def test_what_is_wrong_with_a_set_is_one_line(fault, text, tmp_path):
    folder, split = tmp_path / "cifar10-dvs", {"split": "first100", "name": "last"}
    if fault != "none":
        write_set(folder, (0, 1))
    if fault == "file":
        os.truncate(folder / "cat/cifar10_cat_1.aedat", 500)
    if fault == "address":
        (folder / "dog/cifar10_dog_1.aedat").write_bytes(pack([5, 0x12345], [1, 2]))
    if fault in ("class", "zip"):
        shutil.rmtree(folder / "horse")
    if fault == "zip":
        (folder / "horse.zip").write_bytes(b"<html>not found</html>")
    with pytest.raises(data.UserError, match=rf"^[^\n]*{text}[^\n]*$"):
        data.load("cifar10-dvs", tmp_path, dvs_split=split.get(fault, "random"), workers=2)
    # Left behind, they would keep this process from ending.
    assert not multiprocessing.active_children()


def test_worker_processes_outlive_signals_but_not_the_program():
    """What reaches the whole group must not end them; a loader left open not keep the program."""
    script = '''
import os, signal, time, torch, data
class Items(torch.utils.data.Dataset):
    def __len__(self): return 100
    def __getitem__(self, i): time.sleep(0.02); return i
loader = torch.utils.data.DataLoader(Items(), num_workers=2, worker_init_fn=data.ignore_signals)
batches = iter(loader)
next(batches), next(batches)    # both are at work
for number in (signal.SIGINT, signal.SIGTERM):
    for worker in batches._workers: os.kill(worker.pid, number)
for i in range(50): next(batches)
print('all there')
keep = [batches]; keep.append(keep); batches.keep = keep'''
    assert "all there" in python("-c", script, seconds=60)


def test_a_killed_preparation_leaves_no_half_array_and_starts_again(tmp_path):
    write_set(tmp_path / "cifar10-dvs", range(4))
    load = f"data.load('cifar10-dvs', {str(tmp_path)!r}, dvs_split='random', workers=1)"
    # The file is written, then the preparation is killed instead of renaming it.
    program = """
import data, os, signal
replace = os.replace
def kill_at_an_array(temporary, path):
    if path.name.endswith(".npy"):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(temporary, path)
os.replace = kill_at_an_array
"""
    python("-c", program + load, code=-signal.SIGKILL)
    folder = tmp_path / "cifar10-dvs"
    assert not list(folder.glob("[!.]*.npy")) and len(list(folder.glob(".*.npy.*"))) == 1
    write_set(tmp_path / "new/cifar10-dvs", range(4))
    killed, new = (data.load("cifar10-dvs", root, dvs_split="random", workers=0)
                   for root in (tmp_path, tmp_path / "new"))
    assert equal_sets(killed, new)


def test_preparing_says_how_long_it_takes(tmp_path, monkeypatch, capsys):
    write_set(tmp_path / "cifar10-dvs", range(4))
    ticks = iter(range(100, 1000, 10))
    monkeypatch.setattr(data.time, "perf_counter", lambda: next(ticks))
    data.load("cifar10-dvs", tmp_path, dvs_split="random", workers=0)
    said = capsys.readouterr().out.splitlines()
    assert said[0].split() == "frames of 25 of 40 recordings, 2/s, 6 s left".split()
    assert len(said) == 2 and "40 of 40" in said[1] and "0 s left" in said[1]


def test_drawn_recordings_are_a_set_like_any_other(tmp_path):
    data.draw_recordings(tmp_path, per_class=1)
    (tmp_path / "ring/drawn_ring_0.aedat").unlink()
    # Adds what is missing.
    data.draw_recordings(tmp_path, per_class=1)
    found = data.find_recordings(tmp_path, data.SHAPES, ".aedat")
    assert [(label, number) for label, number, *_ in found] == [(label, 0) for label in range(10)]
    for _, _, path, *_ in found:
        t, x, y, p = data.read_aedat(tmp_path / path)
        assert len(t) > 1000 and (np.diff(t) >= 0).all() and 0.3 < p.mean() < 0.7


# ---- training and evaluation ---------------------------------------------------------------------

# What follows SMALL in the run of the fixture `trained`: two epochs of five steps, and its folder.
TRAINED = "--limit 160 --batch-size 32 --epochs 2 --out".split()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a finished run on drawn images, by a process of its own."""
    out = tmp_path_factory.mktemp("run") / "out"
    python("train.py", *SMALL, *TRAINED, out)
    return out


@pytest.fixture(scope="module")
def drawn():
    return data.load("shapes")


@pytest.fixture
def shapes(drawn, monkeypatch):
    """Whatever loads a data set in this process gets the shapes, which take a second to draw."""
    # A copy, because --limit and --classes change the data set.
    monkeypatch.setattr(data, "load", lambda *arguments: copy.deepcopy(drawn))


def tiny_run(folder, n_test=16):
    """Flags of a run of a second or two: a narrow network on 64 random images."""
    rng, arrays = np.random.default_rng(0), folder / "data/cifar10"
    arrays.mkdir(parents=True)
    for part, n in (("train", 64), ("test", n_test)):
        np.save(arrays / f"{part}_images.npy", rng.integers(0, 256, (n, 32, 32, 3), np.uint8))
        np.save(arrays / f"{part}_labels.npy", (np.arange(n) % 10).astype(np.uint8))
    flags = "--dataset cifar10 --recipe fast --width 4 --timesteps 2 --batch-size 8 --epochs 3"
    return [*flags.split(), "--no-compile", "--data-dir", str(folder / "data")]


@pytest.fixture
def tiny(tmp_path):
    return lambda n_test=16: tiny_run(tmp_path, n_test)


def weights(file):
    return torch.load(file, weights_only=True)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def log(out):
    """The rows of a run's log.csv without its times."""
    lines = (out / "log.csv").read_text().splitlines()
    assert lines[0].endswith(",images_per_s,seconds")
    return [line.split(",")[:-2] for line in lines]


def test_training_writes_log_and_checkpoints(trained):
    header, *rows = log(trained)
    assert header == "epoch lr train_loss train_acc test_acc_t1 test_acc_t2".split()
    assert [row[0] for row in rows] == ["1", "2"]
    # No temporary file is left.
    assert {file.name for file in trained.iterdir()} == {"log.csv", "last.pt", "best.pt"}
    last, best = (torch.load(trained / f"{n}.pt", weights_only=True) for n in ("last", "best"))
    # Checkpoints count epochs from 0. The last epoch ended with its fifth step.
    assert (last["epoch"], last["step"]) == (1, 5)
    # Only last.pt is for training on, which needs the state of the optimizer.
    assert "optimizer" in last and "optimizer" not in best


def test_a_seed_gives_the_same_run_everywhere(capsys, monkeypatch, shapes, trained, tmp_path):
    x, logits = torch.randn(8, 3, 32, 32), []

    def note_logits(model, *_):
        logits.append(model.eval()(x))
        return {"top1": 0.0, "top1_at": [0.0, 0.0]}

    # The run of `trained` once more, in this process, and with another seed. In the place of its
    # evaluation the network at the end of each epoch is asked for the logits of some noise.
    monkeypatch.setattr(train, "evaluate", note_logits)
    for seed in (0, 1):
        printed(capsys, train, *SMALL, "--seed", seed, *TRAINED, tmp_path / str(seed))
    there = weights(trained / "last.pt")
    assert same(there, weights(tmp_path / "0/last.pt"))
    assert not same(there, weights(tmp_path / "1/last.pt"))
    # Epoch, learning rate, loss and accuracy in training.
    assert [row[:4] for row in log(trained)] == [row[:4] for row in log(tmp_path / "0")]
    # The other process's checkpoint is the very network that this one has trained.
    loaded = train.build_network(train.load_checkpoint(trained / "last.pt"))
    assert torch.equal(loaded(x), logits[1])
    # That includes the start that each of the 17 neuron layers has learnt.
    starts = [value for name, value in there.items() if name.endswith("v_init")]
    assert len(starts) == 17 and any(start != 0 for start in starts)


def small(arch, num_classes, timesteps, in_channels, width, start=None, **neuron_options):
    """In the place of models.build: one convolution and neuron layer, compiled in seconds."""
    shape = num_classes, timesteps, in_channels, width
    return models.ResNet(models.Block, [], *shape, neuron_options)


def assert_agreement_with_the_log(capsys, out, images):
    """eval.py must print the accuracies that the last row of the run's log has."""
    said = printed(capsys, evaluation, out / "last.pt")
    at1, at2 = (100 * float(share) for share in log(out)[-1][-2:])
    for expected in (f"top-1 {at2:.2f} %", f"t=1: {at1:.2f} %", f"of {images} images"):
        assert expected in said


def test_evaluation_agrees_with_the_log(capsys, shapes, trained):
    assert_agreement_with_the_log(capsys, trained, images=1000)


def test_some_of_the_classes_are_trained_and_evaluated(capsys, monkeypatch, shapes, tmp_path):
    # A network so small learns enough in a few steps for its accuracy to change with t.
    monkeypatch.setattr(models, "build", small)
    flags = "--classes 3 --limit 200 --batch-size 8 --lr 0.05 --epochs 1 --out".split()
    printed(capsys, train, *SMALL, *flags, tmp_path)
    assert weights(tmp_path / "last.pt")["head.weight"].shape[0] == 3
    # The test set holds 100 images of each class.
    assert_agreement_with_the_log(capsys, tmp_path, images=300)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of this C library")
def test_on_a_cpu_the_memory_of_freed_tensors_is_used_again():
    # A page that the system hands out anew is a page fault: 64 MiB have 16,384 pages of 4 KiB.
    code = """import resource, torch, train
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(2 ** 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
at_first, device = faults(), train.use_device("cpu")
faults()
print(at_first, faults())"""
    # The setting holds for a whole process, so it takes a new one to see the difference.
    at_first, later = map(int, python("-c", code).split())
    # There are few faults at first, too, where the system uses huge pages.
    assert later < 100 and (at_first < 100 or at_first > 5 * 16000)


def test_the_learning_rate_warms_up_and_falls_to_zero():
    args = types.SimpleNamespace(lr=0.4, warmup=0.1)
    rates = [train.learning_rate(step, 100, args) for step in range(100)]
    # Ten of the hundred steps lead to the peak, in equal steps.
    assert rates[:10] == pytest.approx([0.04 * (step + 1) for step in range(10)])
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] < 1e-3


def settings_of(*flags):
    return train.with_recipe(train.parse(list(flags))[0])


def test_the_papers_recipe_is_printed_and_followed(capsys, tiny, tmp_path):
    tiny()
    args = settings_of("--dataset", "cifar10", "--data-dir", str(tmp_path / "data"))
    assert args.arch == "resnet19" and args.width == 64
    # Only for speed.
    args.width, procs = 4, train.Processes("cpu")
    dataset = train.make_dataset(args, procs)
    _, model = train.make_model(args, dataset, procs.device)
    train.describe(args, dataset, model, tmp_path, procs)
    paper = ("recipe paper: epochs 200, batch_size 64, optimizer sgd, lr 0.02, warmup 0.0, "
             "neuron_rate 1.0, weight_decay 0.0005, decayed all, start published, "
             "label_smoothing 0.0, mixup 0.0, augment plain")
    assert paper in capsys.readouterr().out
    optimizer = train.make_optimizer(model, args)
    assert type(optimizer) is torch.optim.SGD and train.learning_rate(0, 1000, args) == 0.02
    for group in optimizer.param_groups:
        assert group["momentum"] == 0.9 and not group["nesterov"]


@pytest.mark.parametrize("recipe", ["paper", "fast"])
def test_learning_rates_and_decay_depend_on_what_a_parameter_is(recipe):
    model, expected, found = models.build("resnet19", 10, 2, width=4), {}, {}
    for layer in model.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            # The paper treats all parameters alike: the full rate, and weight decay.
            expected[parameter] = (1.0, 5e-4)
            if recipe == "fast" and isinstance(layer, TrLIF):
                expected[parameter] = (0.1, 0.0)
            elif recipe == "fast" and (isinstance(layer, nn.BatchNorm2d) or name == "bias"):
                expected[parameter] = (1.0, 0.0)
    for group in train.make_optimizer(model, settings_of("--recipe", recipe)).param_groups:
        found.update(dict.fromkeys(group["params"], (group["rate"], group["weight_decay"])))
    assert found == expected


def test_recipes_are_chosen_by_data_and_network_and_flags_override_them(tiny):
    assert settings_of("--dataset", "shapes").recipe == "fast"
    assert settings_of("--dataset", "shapes-dvs").recipe == "fast"
    assert settings_of("--dataset", "shapes", "--arch", "spikformer").recipe == "spikformer"
    fast, chosen = settings_of("--recipe", "fast"), settings_of("--recipe", "fast", "--lr", "0.1")
    assert fast.lr == 0.3 and vars(chosen) == {**vars(fast), "lr": 0.1}
    # The recipe leaves the batch size to the data. Here it has to fit 64 images.
    args = settings_of(*tiny())
    args.batch_size = None
    train.make_dataset(args, train.Processes("cpu"))
    assert args.batch_size == 16


def test_images_a_second_leave_out_the_first_step(capsys, monkeypatch, tiny, tmp_path):
    # Seconds that the first step takes, as if it compiled something, and the seven others.
    durations, clock = [1.0] + [0.01] * 7, [0.0]

    def step(*_):
        clock[0] += durations.pop(0)
        # Loss times images, right answers and images of the step.
        return torch.tensor([8.0, 1.0, 8.0])

    monkeypatch.setattr(train, "train_step", step)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    printed(capsys, train, *tiny(), "--epochs", 1, "--out", tmp_path / "run")
    *_, rate, seconds = (tmp_path / "run/log.csv").read_text().splitlines()[1].split(",")
    # 8 images in 0.01 s, and 1.07 s altogether.
    assert (rate, seconds) == ("800.0", "1.1") and not durations


def test_a_network_that_cannot_be_compiled_trains_unfused(capsys, monkeypatch, tiny, tmp_path):
    def call(*_):
        raise RuntimeError("no compiler here\nand much more")

    def compile_model(model, **_):
        model._compiled_call_impl = call

    monkeypatch.setattr(models, "build", small)
    monkeypatch.setattr(models, "compile_model", compile_model)
    # Nor are neurons fused that are so few: the result is the plain run's to the bit.
    monkeypatch.setattr(neuron, "CPU_COMPILE_FROM", 2**40)
    flags = [*tiny(), "--epochs", 1]
    printed(capsys, train, *flags, "--out", tmp_path / "off")
    assert not neuron.COMPILE
    said = printed(capsys, train, *flags, "--compile", "network", "--out", tmp_path / "network")
    line = "The network cannot be compiled here, only its neurons are: no compiler here\n"
    assert said.count(line) == 1 and "much more" not in said and neuron.COMPILE
    assert same(weights(tmp_path / "off/last.pt"), weights(tmp_path / "network/last.pt"))


def test_a_compiled_network_takes_the_same_first_step(capsys, monkeypatch, tiny, tmp_path):
    monkeypatch.setattr(models, "build", small)
    flags = [*tiny(), "--epochs", 1, "--limit", 8]
    rows, states = [], []
    for fuse in ("off", "network"):
        said = printed(capsys, train, *flags, "--compile", fuse, "--out", tmp_path / fuse)
        assert "cannot be compiled" not in said
        rows.append(log(tmp_path / fuse)[1])
        states.append(weights(tmp_path / fuse / "last.pt"))
    # The third column is the loss, the fourth the accuracy in training.
    off, network = rows
    assert float(off[2]) == pytest.approx(float(network[2]), abs=2e-5) and off[3] == network[3]
    # Compiling takes a trial step, which must leave nothing behind in weights and statistics.
    torch.testing.assert_close(*states, rtol=1e-3, atol=1e-4)


# ---- looking inside ------------------------------------------------------------------------------

# Sides of images so small that 2 x 2 places are left in the last layer. Only spikformer has 8 x 8,
# because with fewer tokens hardly any spikes of queries, keys and values meet.
SIDES = {"resnet19": 8, "resnet18": 64, "sew_resnet18": 64, "spikformer": 32}


def noise(arch, n, events=False):
    """n random images [n, 3, H, W], or recordings of two frames of event counts [n, 2, 2, H, W]."""
    side = SIDES[arch]
    if events:
        return torch.randint(0, 3, (n, 2, 2, side, side)).double()
    return torch.randn(n, 3, side, side).double()


def batches_of(x, size):
    return [(part, torch.arange(len(part)) % 10) for part in x.split(size)]


def randomised(arch, events=False, surrogate="trsg"):
    """A network in float64 that fires in every layer, with every threshold, leak, start, scale,
    shift and running mean different."""
    torch.manual_seed(0)
    options = dict(in_channels=2 if events else 3, width=4, surrogate=surrogate)
    model = models.build(arch, num_classes=10, timesteps=2, start="kaiming", **options).double()
    for layer in model.modules():
        if isinstance(layer, TrLIF):
            # Thresholds from 0.31 to 0.85, which are the softplus of these.
            nn.init.uniform_(layer.raw_threshold, -1.0, 0.3)
            nn.init.uniform_(layer.raw_decay, -0.5, 1.0)
        elif isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(layer.weight, 0.7, 1.5)
            nn.init.uniform_(layer.bias, -0.3, 0.5)
            layer.momentum = 0.5
    for attention in getattr(model, "attention", []):
        # Products of three spikes are small, so the threshold behind them is 0.018.
        nn.init.constant_(attention.lif.raw_threshold, -4.0)
    # BatchNorm gets statistics that fit, or no spike would arrive in the last layers.
    with torch.no_grad():
        for _ in range(4):
            model.train()(noise(arch, 16, events))
    for layer in evaluation.neurons_of(model).values():
        nn.init.uniform_(layer.v_init, -0.1, 0.9).mul_(layer.threshold.detach())
    return model.eval()


def flows(model, x):
    """{name of a layer: (what enters it, what leaves it)} while the network computes on x."""
    model, found = copy.deepcopy(model), {}
    names = {layer: name for name, layer in model.named_modules()}

    def note(layer, inputs, output):
        found[names[layer]] = inputs[0], output

    for layer in names:
        layer.register_forward_hook(note)
    with torch.no_grad():
        model(x)
    return found


def checkpoint_file(path, arch="resnet19", amp="--no-amp"):
    """A checkpoint of a network of width 4 with random weights, as train.py would write it."""
    network = dict(arch=arch, num_classes=10, timesteps=2, in_channels=3, width=4)
    settings = vars(settings_of("--dataset", "shapes", amp))
    content = dict(format=train.FORMAT, network=network, epoch=1, settings=settings)
    mean, std = data.STATISTICS["shapes"][:2]
    content.update(classes=data.SHAPES, mean=mean, std=std)
    torch.save({**content, "model": randomised(arch).float().state_dict()}, path)
    return path


def test_evaluation_agrees_with_a_plain_count():
    model, x, y = randomised("resnet19"), noise("resnet19", 50), torch.randint(0, 10, (50,))
    with torch.no_grad():
        logits = model(x)
    # Every second label is the network's own answer, which it does not give at the first step yet.
    y[::2] = logits.mean(0).argmax(1)[::2]
    right = [(logits[:t].mean(0).argmax(1) == y).double().mean().item() for t in (1, 2)]
    assert right[0] != right[1]
    # The last of three batches is half padding, which has the label -1.
    padded = torch.cat([x, x[:10]]), torch.cat([y, torch.full((10,), -1)])
    result = train.evaluate(model, zip(*(tensor.split(20) for tensor in padded)))
    assert result["top1_at"] == pytest.approx(right) and result["top1"] == pytest.approx(right[1])
    # An image is right among the five best where fewer than five other classes are better.
    mean = logits.mean(0)
    better = (mean > mean.gather(1, y[:, None])).sum(1)
    assert result["top5"] == pytest.approx((better < 5).double().mean().item())
    assert result["images"] == 50


def test_operations_by_hand():
    # A stem, a block of stride 2 and three channels, and a head for four classes.
    model = models.ResNet(models.Block, [(3, 1, 2)], 4, 2, 1, 1, {}).eval()
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.constant_(layer.weight, 9.0)
    # The stem copies its image. A place with the value 10 fires in both steps, one with 0 never.
    nn.init.dirac_(model.stem[0].weight)
    # Of two images of 5 x 5 the first is lit in a corner, at an edge, in its centre and elsewhere.
    x = torch.zeros(2, 1, 5, 5)
    x[0, 0, [0, 0, 2, 3], [0, 2, 2, 4]] = 10.0
    result, counts = evaluation.observe(model, [(x, torch.zeros(2))])
    rows = evaluation.operations(model, counts, result["images"])
    # A 3 x 3 kernel reads the rows of five 2, 3, 3, 3, 2 times, with stride 2 (centres 0, 2, 4)
    # 1, 2, 1, 2, 1 times, and the rows of three 2, 3, 2 times. Two steps and the mean over two
    # images cancel: the numbers are those of one step and image.
    expected = {
        # Spikes in, accumulates, multiply-accumulates, and those of a conventional network.
        # The image is analog and multiplied once for both steps.
        "stem": (0, 0, (2 + 3 + 3 + 3 + 2) ** 2, (2 + 3 + 3 + 3 + 2) ** 2),
        # A 1 x 1 kernel for three channels, which misses the lit place in row 3.
        "blocks.0.shortcut": (4, 3 * 3, 0, 3 * 9),
        "blocks.0.conv1": (4, 3 * (1 * 1 + 1 * 1 + 1 * 1 + 2 * 1), 0, 3 * (1 + 2 + 1 + 2 + 1) ** 2),
        # Here (0, 0), (0, 1), (1, 1), (1, 2) and (2, 2) saw a spike and fire in all channels.
        "blocks.0.conv2": (3 * 5, 3 * 3 * (4 + 6 + 9 + 6 + 4), 0, 3 * 3 * (2 + 3 + 2) ** 2),
        # All nine places fire. A conventional head reads the mean over them.
        "head": (3 * 9, 3 * 9 * 4, 0, 3 * 4),
    }
    assert [row["layer"] for row in rows] == list(expected)
    for row, (spikes, acs, macs, dense) in zip(rows, expected.values()):
        assert (row["spikes"], row["acs"]) == (spikes, acs), row["layer"]
        assert (row["macs"], row["dense"]) == (macs, dense), row["layer"]
        # The energy of an accumulate and of a multiply-accumulate in pJ.
        assert row["pj"] == pytest.approx(0.9 * acs + 4.6 * macs)
        assert row["dense_pj"] == pytest.approx(4.6 * dense)


def test_fan_out_is_the_number_of_connections_that_carry_a_spike():
    # An image for each of 9 x 8 places, with a spike there alone.
    spikes = torch.zeros(72, 4, 9, 8)
    spikes[:, 1] = torch.eye(72).view(72, 9, 8)
    # Groups, kernel, stride and padding.
    for groups, *shape in (1, 3, 1, 1), (1, 3, 1, 0), (1, 7, 2, 3), (2, 1, 2, 0), (4, 3, 2, 1):
        conv = nn.Conv2d(4, 8, *shape, groups=groups, bias=False)
        # Every connection passes a 1 on.
        nn.init.ones_(conv.weight)
        connections = conv(spikes).sum((1, 2, 3)).view(9, 8)
        assert torch.equal(evaluation.fan_out(conv, (9, 8)).float(), connections), shape


@pytest.mark.parametrize("arch", SIDES)
@pytest.mark.parametrize("events", [False, True])
def test_operations_count_every_spike_of_a_folded_network(arch, events):
    """Exactly what enters each layer of the folded network, residual streams included."""
    model, x, expected = randomised(arch, events), noise(arch, 8, events), {}
    folded = models.fold(model)
    found = flows(folded, x)
    for name, layer in folded.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear, models.Scale)):
            spikes = found[name][0]
            fan = evaluation.fan_out(layer, spikes.shape[2:])
            expected[name.removesuffix(".0")] = (spikes * fan).sum().item() / len(x)
        elif isinstance(layer, models.SpikingSelfAttention):
            q, k, v = (layer.split_heads(found[f"{name}.{part}"][1]) for part in "qkv")
            expected[f"{name} k^T v"] = (k.transpose(2, 3) @ v).sum().item() / len(x)
            # A spike of q adds the two channels of a head.
            expected[f"{name} q (k^T v)"] = 2 * q.sum().item() / len(x)
    # The head gets the means of spikes over all places.
    expected["head"] *= 64 if arch == "spikformer" else 4
    for network in (model, folded):
        result, counts = evaluation.observe(network, batches_of(x, 5))
        rows = evaluation.operations(network, counts, result["images"])
        rows = {row["layer"]: row for row in rows}
        assert rows.keys() == expected.keys()
        # A conventional head reads each mean once.
        assert rows["head"]["dense"] == model.head.weight.numel()
        if arch == "spikformer":
            # Each of 64 tokens multiplies the 2 channels of k with the 2 of v, in 12 heads.
            assert rows["attention.1 k^T v"]["dense"] == 64 * 12 * 2 * 2
        if arch == "resnet19":
            # A conventional plain shortcut has no weights.
            assert rows["blocks.1.shortcut"]["dense"] == 0
        if not events:
            # The values of an image are analog: a multiplication for each connection.
            stem = rows.pop("patches.0" if arch == "spikformer" else "stem")
            assert stem["macs"] == stem["dense"] > 0
        for name, row in rows.items():
            assert row["acs"] == pytest.approx(expected[name], rel=1e-12), name
            assert row["acs"] > 0 == row["macs"], name


@pytest.mark.parametrize("surrogate", ["trsg", "absolute"])
@pytest.mark.parametrize("arch", SIDES)
def test_folding_changes_nothing_and_makes_all_spikes_one(arch, surrogate):
    model, x, fires = randomised(arch, surrogate=surrogate), noise(arch, 16), []
    folded = models.fold(model)
    with torch.no_grad():
        expected, logits = model(x), folded(x)
    assert (expected - logits).abs().max() <= 1e-9 * expected.abs().max()
    assert torch.equal(expected.argmax(2), logits.argmax(2))
    assert torch.equal(expected.mean(0).argmax(1), logits.mean(0).argmax(1))
    # The images are told apart, so spikes arrived.
    assert expected.std(1).min() > 0
    for name, (entering, leaving) in flows(folded, x).items():
        layer = folded.get_submodule(name)
        assert not isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d))
        # Neurons and max-pooling send spikes, and weights receive them, except for those that the
        # images meet and those of the head, which meet means over 4 or 64 places.
        sends = isinstance(layer, (TrLIF, nn.MaxPool2d))
        receives = isinstance(layer, (nn.Conv2d, nn.Linear, models.Scale))
        if layer is folded.head:
            assert (64 * entering == (64 * entering).round()).all()
        elif sends or (receives and name not in ("stem.0", "patches.0.0")):
            spikes = leaving if sends else entering
            assert ((spikes == 0) | (spikes == 1)).all(), name
            fires.append(spikes.any())
    assert sum(fires) > 0.9 * len(fires)
    # The original is untouched.
    for layer in evaluation.neurons_of(model).values():
        assert layer.surrogate == surrogate


def test_folding_keeps_low_thresholds_of_attention_finite():
    model = models.fold(models.build("spikformer", 10, 2, width=8, threshold=0.05))
    # Half the threshold, divided by the heights of the spikes of q, k and v.
    expected = 0.5 * 0.05 / 0.05**3
    assert model.attention[0].lif.threshold.item() == pytest.approx(expected, rel=1e-4)


# The borders of a histogram's bins, in thresholds.
EDGES = np.linspace(-evaluation.RANGE, evaluation.RANGE, evaluation.BINS + 1)


def test_wasserstein_from_histograms():
    rng = np.random.default_rng(0)
    samples = rng.normal(0.3, 0.7, 20000), rng.gamma(2.0, 0.5, 20000) - 1
    laws = [evaluation.histogram(2.5 * torch.from_numpy(v), theta=2.5) for v in samples]
    for v, law in zip(samples, laws):
        # Rounding may move a value across an edge, which changes the counts of two bins.
        assert (law - torch.from_numpy(np.histogram(v, EDGES)[0])).abs().sum() <= 4
    # Between samples of equal size the distance is that of the sorted values.
    exact = np.abs(np.sort(samples[0]) - np.sort(samples[1])).mean()
    distance = evaluation.wasserstein(*laws).item()
    assert abs(distance - exact) <= 1 / evaluation.BINS_PER_THRESHOLD


@pytest.mark.parametrize("start", [None, 0.0])
def test_potentials_are_those_of_the_neurons(start):
    model, x, steps = randomised("resnet19"), noise("resnet19", 4), 10
    _, laws = evaluation.potentials(model, batches_of(x, 3), model.timesteps, steps, start)
    # The first layer once more, after arXiv:2511.08708. Its current is the same at all steps.
    current, theta, k = flows(model, x)["stem"][1], model.lif.threshold, model.lif.decay
    v, expected = model.lif.v_init if start is None else start, []
    for _ in range(steps):
        h = v + k * (current - v)
        v = h - theta * (h >= theta)
        expected.append((v / theta).detach())
    # Both of the network's steps, and the last two together. More images take no more memory.
    assert laws["lif"].shape == (3, evaluation.BINS)
    for law, values in zip(laws["lif"], [*expected[:2], torch.stack(expected[-2:])], strict=True):
        exact = torch.from_numpy(np.histogram(values, EDGES)[0])
        assert law.sum() == exact.sum() == values.numel()
        # Rounding may move a value across an edge.
        assert evaluation.wasserstein(law, exact) < 1e-4


def test_potentials_of_recordings_are_those_of_their_frames_repeated():
    model, x = randomised("resnet19", events=True), noise("resnet19", 4, events=True)
    result, laws = evaluation.potentials(model, batches_of(x, 4), T=2, steps=10)
    # The frames 0, 1, 0, 1, ... as a recording of its own.
    repeated = batches_of(x.repeat(1, 5, 1, 1, 1), 4)
    assert result == train.evaluate(model, repeated)
    _, expected = evaluation.potentials(model, repeated, T=10, steps=10)
    for name, law in laws.items():
        assert torch.equal(law[:2], expected[name][:2])
        # The last row is the law of the last two steps together.
        assert torch.equal(law[2], expected[name][8] + expected[name][9])
    # The frames differ, and so do the potentials.
    assert not torch.equal(laws["lif"][0], laws["lif"][1])


def test_looking_inside_takes_constant_memory_and_changes_nothing():
    model, x = randomised("resnet19"), noise("resnet19", 4)
    before = copy.deepcopy(model.state_dict())
    # Twice the images give twice the counts, in tensors of the same size.
    _, few = evaluation.observe(model, batches_of(x, 4))
    _, many = evaluation.observe(model, batches_of(torch.cat([x, x]), 4))
    assert same({name: 2 * count for name, count in few.items()}, many)
    evaluation.potentials(model, batches_of(x, 4), T=2, steps=10, v_init=0)
    assert same(before, model.state_dict()) and model.timesteps == 2
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.modules())


@pytest.mark.parametrize("arch", ["resnet19", "spikformer"])
def test_a_saved_folded_network_predicts_the_same(capsys, shapes, tmp_path, arch):
    path, saved = checkpoint_file(tmp_path / "a.pt", arch), tmp_path / "f.pt"
    said = printed(capsys, evaluation, path, "--save-folded", saved, "--images", 64)
    assert "same prediction on 100.00 % of 64 images" in said
    original, folded = (train.build_network(train.load_checkpoint(file)) for file in (path, saved))
    x = noise("resnet19", 64).float()
    with torch.no_grad():
        expected, logits = original(x), folded(x)
        assert torch.equal(models.fold(original)(x), logits)
    # In float32 rounding may make or suppress a spike, but changes no prediction here.
    assert torch.equal(expected.mean(0).argmax(1), logits.mean(0).argmax(1))
    again = printed(capsys, evaluation, saved, "--images", 64, "--batch-size", 16)
    assert "folded" in again
    assert again.partition("read out")[2] == said.partition("read out")[2] != ""
    fails(capsys, evaluation, [saved, "--save-folded", saved], "folded already")
    # A folded network may be replaced, a checkpoint of training not.
    printed(capsys, evaluation, path, "--save-folded", saved, "--images", 2)
    fails(capsys, evaluation, [path, "--save-folded", path], "is not a folded network")


def test_report_comparison_and_pictures(capsys, monkeypatch, shapes, tmp_path):
    pytest.importorskip("matplotlib")
    # Only for speed. What these numbers must be is tested below.
    monkeypatch.setattr(evaluation, "gradient_norm", lambda *case: 1.0)
    files = [checkpoint_file(tmp_path / "a.pt"), checkpoint_file(tmp_path / "b.pt", "sew_resnet18")]
    report = tmp_path / "r.md"
    # The last batch is smaller than the others.
    flags = ["--images", 3, "--batch-size", 2, "--inspect", "--report", report]
    flags += ["--plot", tmp_path / "p.png", "--picture", tmp_path / "methods.png"]
    said, text = printed(capsys, evaluation, *files, *flags), report.read_text()
    assert text.startswith("# Comparison") and text in said and "nan" not in text
    assert text.count("## Temporal covariate shift") == 2
    assert "blocks.7.lif2" in text and "4.6 pJ" in text
    for name in ("p.png", "p-2.png", "methods.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_precision_is_that_of_training_unless_told(capsys, shapes, tmp_path):
    plain = checkpoint_file(tmp_path / "a.pt", amp="--no-amp")
    amp = checkpoint_file(tmp_path / "b.pt", amp="--amp")
    cases = (plain, [], "float32"), (plain, ["--amp"], "bfloat16")
    cases += (amp, [], "bfloat16"), (amp, ["--no-amp"], "float32")
    for file, flag, expected in cases:
        said = printed(capsys, evaluation, file, *flag, "--images", 1)
        assert f"computed in {expected}\n" in said
    # Nor may a GPU round what is computed in float32.
    assert not torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"


def test_gradients_keep_their_size_with_trsg_only():
    spread = {}
    for surrogate in ("trsg", "absolute"):
        norms = [evaluation.gradient_norm(surrogate, theta) for theta in (0.1, 1.0, 10.0)]
        spread[surrogate] = max(norms) / min(norms)
    assert spread["trsg"] < 1.5 and spread["absolute"] > 1e3


def test_speed_prints_times_and_what_is_host_bound(capsys, monkeypatch):
    # Milliseconds, plain and fused, and the floor, of a tiny, a small and a large layer.
    times = {2**14: (0.4, 0.2, 0.01), 2**15: (0.8, 0.25, 0.1), 2**20: (90.0, 10.0, 5.0)}
    monkeypatch.setattr(evaluation, "NEURONS", {"cpu": (2**15, 2**20)})
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "layer_times", lambda neurons, *more: times[neurons])
        small, large = printed(capsys, evaluation, "--speed").splitlines()[-4:-2]
    # The fused small layer takes hardly longer than the tiny one.
    assert "32,768" in small and "host-bound" in small
    # Fused it takes twice the floor, and plain nine times that.
    assert "1,048,576" in large and "2.00 |" in large and "9.0 |" in large
    assert "host-bound" not in large
    # And really measured, on a layer so small that it runs unfused.
    monkeypatch.setattr(evaluation, "SECONDS", 0.01)
    assert all(time > 0 for time in evaluation.layer_times(64, 2, "cpu", torch.float32))


@pytest.mark.parametrize("arguments, expected", [
    ("a.pt --plot p.png", "pictures need matplotlib: pip install matplotlib"),
    ("--picture m.png", "pictures need matplotlib: pip install matplotlib"),
    ("", "no checkpoint given"),
    ("a.pt --images 0", "at least 1"),
    ("a.pt b.pt --save-folded c.pt", "takes one checkpoint"),
    ("a.pt", "a.pt"),
    ("a.pt --device nonsense", "--device nonsense cannot be used"),
    ("--picture a.pt", "does not end in .png"),
    ("--plot a.pt", "does not end in .png"),
    ("--report a.pt b.pt", "does not end in .md")])
def test_mistakes_are_said_before_the_work(capsys, monkeypatch, arguments, expected):
    # None of the files exists, so that work on them would end with another message. Importing
    # matplotlib fails as if it were not installed.
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    fails(capsys, evaluation, arguments.split(), expected)


# ---- several processes ---------------------------------------------------------------------------

def two(*arguments, code=0):
    """Run a program in two processes, as torchrun starts them. Both must exit with code."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = dict(os.environ, PYTHONPATH=str(HERE), OMP_NUM_THREADS="1", WORLD_SIZE="2")
    common.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    command = [sys.executable, *map(str, arguments)]
    how = dict(cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    both = [subprocess.Popen(command, env={**common, "RANK": rank, "LOCAL_RANK": rank}, **how)
            for rank in "01"]
    said = [process.communicate(timeout=600) for process in both]
    errors = "".join(error for _, error in said)
    assert [process.returncode for process in both] == [code] * 2, errors
    # "terminate called": threads of a process group that outlive the interpreter say that.
    assert "Traceback" not in errors and "terminate" not in errors, errors
    return said[0][0]


# The same five steps, alone with whole batches and as two processes with half of each.
EQUAL = """
import os, sys, torch, torch.distributed as dist, torch.nn.functional as F, models, neuron
from torch.nn.parallel import DistributedDataParallel
file, arch, fused = sys.argv[1:]
def train(rank, world, fused):
    neuron.COMPILE, neuron.CPU_COMPILE_FROM = fused != "plain", 0
    torch.manual_seed(0)
    small = models.ResNet(models.Block, [(8, 1, 1)], 10, 2, 3, 4, {})
    model = small if arch == "small" else models.build(arch, 10, 2, width=4)
    model = model.double().train()
    for m in model.modules():
        if isinstance(m, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            m.eval()  # running statistics; affine parameters still train
            torch.nn.init.constant_(m.weight, 2.0)
    if fused == "network":
        models.compile_model(model)
    trained = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for step in range(5):
        g = torch.Generator().manual_seed(step)
        x = torch.randn(8, 3, 32, 32, generator=g, dtype=torch.float64)
        y = torch.randint(0, 10, (8,), generator=g)
        loss = F.cross_entropy(trained(x[rank::world]).mean(0), y[rank::world])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.state_dict()
rank = int(os.environ["RANK"])
alone = train(0, 1, "plain") if rank == 0 else None
dist.init_process_group("gloo")
together = train(rank, 2, fused)
assert not neuron.FAILED
if rank == 0:
    torch.save((alone, together), file)
dist.barrier()
os._exit(0)
"""


@pytest.mark.parametrize("arch, fused", [("resnet19", "plain"), ("resnet19", "neurons"),
                                         ("small", "network"), ("spikformer", "plain")])
def test_two_processes_equal_one_with_the_whole_batch(tmp_path, arch, fused):
    (tmp_path / "program.py").write_text(EQUAL)
    two(tmp_path / "program.py", tmp_path / "both.pt", arch, fused)
    alone, together = torch.load(tmp_path / "both.pt", weights_only=True)
    assert any(v.abs() > 1e-3 for name, v in alone.items() if name.endswith("v_init"))
    for name, value in alone.items():
        torch.testing.assert_close(value, together[name], rtol=1e-8, atol=1e-8, msg=name)


def test_torchrun_trains_and_counts_every_test_image_once(tiny, tmp_path):
    # 17 test images do not divide by two processes.
    flags = [*tiny(17), "--epochs", 2, "--out", tmp_path / "two"]
    python(*"-m torch.distributed.run --standalone --nproc_per_node 2 train.py".split(), *flags)
    model = train.build_network(train.load_checkpoint(tmp_path / "two/last.pt"))
    result = train.evaluate(model, data.load("cifar10", tmp_path / "data").to("cpu").test(5))
    assert result["images"] == 17
    assert log(tmp_path / "two")[-1][-2:] == [f"{share:.5f}" for share in result["top1_at"]]


def test_two_processes_end_cleanly(tiny, tmp_path):
    flags = [*tiny(), "--epochs", 1, "--limit", 16, "--compile", "neurons"]
    assert "done: best" in two("train.py", *flags, "--out", tmp_path / "run")
    # So they do when the first of them finds a mistake: there is a run in that folder.
    two("train.py", *flags, "--out", tmp_path / "run", code=2)


# train.py; an R in a flag is the process's rank. With STOP set the second process gets SIGTERM in
# its fifth step: both are to stop after the tenth of 16.
PROGRAM = """
import os, signal, sys, train
rank, rate = os.environ["RANK"], train.learning_rate
def stopping(step, *others):
    if step == 4 and rank == "1" and sys.argv[1] == "stop":
        os.kill(os.getpid(), signal.SIGTERM)
    return rate(step, *others)
train.learning_rate = stopping
train.run(lambda: train.main([flag.replace("R", rank) for flag in sys.argv[2:]]), "train.py")
"""


def test_two_processes_stopped_and_resumed_equal_two_unbroken(tiny, tmp_path):
    flags = [*tiny(), *"--epochs 2 --batch-size 4 --resume auto --out".split()]
    program, shared = tmp_path / "program.py", tmp_path / "shared"
    program.write_text(PROGRAM)
    two(program, "go", *flags, tmp_path / "unbroken")
    said = two(program, "stop", *flags, shared, code=128 + signal.SIGTERM)
    assert "by step 10 of epoch 1" in said
    # Of two machines without a shared folder the second has no checkpoint.
    shutil.copytree(shared, tmp_path / "of0")
    two(program, "go", *flags, shared)
    two(program, "go", *flags, tmp_path / "ofR")
    assert not (tmp_path / "of1").exists()
    # Bit for bit, and loss and accuracy over both parts of the epoch.
    for name in ("shared", "of0"):
        assert same(weights(tmp_path / "unbroken/last.pt"), weights(tmp_path / name / "last.pt"))
        assert log(tmp_path / "unbroken") == log(tmp_path / name)


def test_how_processes_are_joined(monkeypatch):
    joined = {}
    monkeypatch.setattr(train, "DistributedDataParallel", lambda model, **how: joined.update(how))
    procs = types.SimpleNamespace(world=2, rank=0, device=torch.device("cpu"))
    train.make_fast(nn.Linear(1, 1), None, settings_of("--compile", "off"), procs)
    # Each process has BatchNorm statistics of its own; gradients are not copied into buckets.
    assert joined == dict(device_ids=None, broadcast_buffers=False, gradient_as_bucket_view=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(data.UserError, match="--device cuda:1: .*give cuda"):
        train.Processes("cuda:1")


# ---- interruptions, bad input, long runs ---------------------------------------------------------

# Starts training runs as forks of one process that has imported everything. Each gets a signal at
# a random moment of one of its first steps: counted in steps, so that it does not depend on the
# machine's speed how many are interrupted.
INTERRUPTED = """
import os, random, signal, sys, threading, time, train
number, times, flags = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
rate, sent = train.learning_rate, 0
random.seed(0)
def interrupt(calls, part):
    last = time.perf_counter()
    def learning_rate(*arguments):  # called at the start of every step
        nonlocal calls, last
        now = time.perf_counter()
        if calls == 0:
            wait = part * min(now - last, 0.02)
            threading.Timer(wait, os.kill, (os.getpid(), number)).start()
        calls, last = calls - 1, now
        return rate(*arguments)
    train.learning_rate = learning_rate
while True:
    calls, part = random.randrange(3), random.random()
    child = os.fork()
    if child == 0:
        if sent < times:
            interrupt(calls, part)
        train.run(lambda: train.main(flags), "train.py")
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == 0:
        break
    assert code in (-number, 128 + number), code
    sent += 1
print("signals", sent)
"""


@pytest.mark.parametrize("name, times, epochs", [("SIGKILL", 20, 8), ("SIGTERM", 8, 5)])
def test_killed_runs_continue_bit_for_bit(capsys, tiny, tmp_path, name, times, epochs):
    # A checkpoint every 30 ms: kills fall into writing, too.
    flags = [*tiny(), "--save-every", 0.0005, "--epochs", epochs, "--out"]
    printed(capsys, train, *flags, tmp_path / "whole")
    (tmp_path / "program.py").write_text(INTERRUPTED)
    arguments = int(getattr(signal, name)), times, *flags, tmp_path / "parts", "--resume", "auto"
    assert python(tmp_path / "program.py", *arguments).split()[-1] == str(times)
    assert same(weights(tmp_path / "whole/last.pt"), weights(tmp_path / "parts/last.pt"))
    assert log(tmp_path / "whole") == log(tmp_path / "parts")


@pytest.mark.parametrize("optimizer", ["nesterov", "adamw"])
def test_a_run_of_a_gpu_continues_whatever_its_memory_format(capsys, tiny, tmp_path, optimizer):
    flags = [*tiny(), "--optimizer", optimizer, "--lr", 0.01, "--epochs", 1]
    printed(capsys, train, *flags, "--out", tmp_path / "cpu")
    shutil.copytree(tmp_path / "cpu", tmp_path / "gpu")
    saved = torch.load(tmp_path / "cpu/last.pt", weights_only=True)
    # As a GPU's run has it.
    for state in saved["optimizer"]["state"].values():
        for key, value in state.items():
            if value is not None and value.dim() == 4:
                state[key] = value.contiguous(memory_format=torch.channels_last)
    torch.save(saved, tmp_path / "gpu/last.pt")
    for name in ("cpu", "gpu"):
        printed(capsys, train, "--resume", tmp_path / name, "--epochs", 2)
    assert same(weights(tmp_path / "cpu/last.pt"), weights(tmp_path / "gpu/last.pt"))


def test_a_resumed_run_takes_new_recipe_flags_and_leaves_old_rows(capsys, tiny, tmp_path):
    out = tmp_path / "run"
    printed(capsys, train, *tiny(), "--epochs", 1, "--out", out)
    before = (out / "log.csv").read_text().splitlines()
    said = printed(capsys, train, "--resume", out, "--epochs", 2, "--lr", 0.01)
    assert "recipe fast: epochs 2, batch_size 8, optimizer nesterov, lr 0.01" in said
    _, first, second = (out / "log.csv").read_text().splitlines()
    # The finished epoch is evaluated again, not trained: only the seconds may differ.
    assert first.split(",")[:-1] == before[1].split(",")[:-1]
    # The cosine from 0.01 over 16 steps, the first 0.8 of which warm up.
    expected = 0.01 * 0.5 * (1 + np.cos(np.pi * (15 - 0.8) / (16 - 0.8)))
    assert float(second.split(",")[1]) == pytest.approx(expected, rel=1e-4)


def test_an_epoch_is_saved_before_its_evaluation(capsys, monkeypatch, tmp_path):
    tree = image_tree(tmp_path / "tree", n=1, modes=("RGB", "L"))
    flags = "--dataset folder --image-size 112 --width 4 --timesteps 1 --batch-size 2 --epochs 1"
    flags = [*flags.split(), "--no-compile", "--workers", 0, "--data-dir", tree, "--out"]
    printed(capsys, train, *flags, tmp_path / "whole")
    spoilt = tree / "val/dogs/0.png"
    good = spoilt.read_bytes()
    spoilt.write_text("no image")
    fails(capsys, train, [*flags, tmp_path / "run"], "0.png: not a readable image")
    # All of it is trained and saved, and nothing is claimed about it.
    assert same(weights(tmp_path / "whole/last.pt"), weights(tmp_path / "run/last.pt"))
    assert not (tmp_path / "run/best.pt").exists()
    spoilt.write_bytes(good)
    # Mended, it is evaluated without another step.
    monkeypatch.setattr(train, "train_step", None)
    printed(capsys, train, "--resume", tmp_path / "run")
    assert log(tmp_path / "run") == log(tmp_path / "whole")
    assert same(weights(tmp_path / "whole/best.pt"), weights(tmp_path / "run/best.pt"))


def test_home_folders_and_names_outside_ascii(capsys, monkeypatch, tiny, tmp_path):
    tiny()
    home = tmp_path / "±"
    home.mkdir()
    shutil.move(tmp_path / "data", home)
    flags = "--dataset cifar10 --width 4 --timesteps 1 --batch-size 32 --epochs 1 --no-compile"
    flags = [*flags.split(), "--data-dir=~/data", "--out=~/x"]
    # What cannot be printed is replaced.
    said = python("train.py", *flags, HOME=str(home), PYTHONIOENCODING="ascii")
    assert "?/x" in said and (home / "x/last.pt").exists()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    printed(capsys, train, "--resume=~/x", "--data-dir=~/data")
    files = ["~/x/last.pt", "--data-dir=~/data", "--save-folded=~/folded.pt", "--report=~/r.md"]
    printed(capsys, evaluation, *files, "--images", 4)
    assert (home / "folded.pt").exists() and (home / "r.md").exists()
    assert not list(tmp_path.rglob("~"))


class Bomb:
    """Would run a command if it were unpickled."""

    def __reduce__(self):
        return os.system, ("touch must-not-run",)


def array(values):
    return lambda file: np.save(file, values)


def text(file):
    file.write_text("something else")


def cut(file):
    os.truncate(file, file.stat().st_size // 2)


def entries(**new):
    return lambda file: torch.save({**torch.load(file, weights_only=True), **new}, file)


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)


def best(file):
    shutil.copy(file.parent / "best.pt", file)


def infinite(file):
    model = weights(file)
    model["blocks.3.conv2.0.weight"][0, 0, 0, 0] = float("inf")
    entries(model=model)(file)


def full_disk(file):
    # No file may grow beyond 50 kB.
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))


# Cases are flags, a file and what spoils it, and what the line must say. "new" begins a
# run, "tree" one on images in folders, and "resume" goes on with one.
OUT_OF_RANGE = """--timesteps 0, --epochs 0, --batch-size -8, --classes 1, --lr 0, --lr nan,
--lr inf, --weight-decay -1, --warmup 1, --mixup -1, --threshold 0, --tau 1, --workers -1,
--save-every 0, --label-smoothing 1, --seed 9223372036854775808""".replace("\n", " ")
NO_CHOICE = "--arch alexnet, --dataset mnist, --optimizer lion, --recipe best, --compile all"
NO_NUMBER = "--timesteps two, --width 1.5, --lr fast"
IMAGES, LABELS = "data/cifar10/train_images.npy", "data/cifar10/train_labels.npy"
BAD = [(f"new {flag}", "", None, " is not a") for flag in OUT_OF_RANGE.split(", ")]
BAD += [(f"new {flag}", "", None, "invalid choice: ") for flag in NO_CHOICE.split(", ")]
BAD += [(f"new {flag}", "", None, " value: ") for flag in NO_NUMBER.split(", ")]
BAD += [
    # Nor is it taken for --epochs.
    ("new --epoch 3", "", None, "unrecognized arguments: --epoch 3"),
    ("new --device gpu", "", None, "--device gpu cannot be used here"),
    # Flags that do not go together, with each other or with the data.
    ("--resume auto", "", None, "--resume auto needs --out DIR"),
    ("resume --out there", "", None, "leave --out out"),
    ("new --resume=", "", None, "a name is needed"),
    ("new --batch-size 65", "", None, "at most the 64 training images"),
    ("new --accumulate 3", "", None, "must divide by 1 processes x --accumulate 3"),
    ("new --classes 11", "", None, "--classes 11 is more than the 10 classes"),
    ("new --limit 65", "", None, "--limit 65 is more than the 64 training images"),
    ("new --arch spikformer --width 6", "", None, "multiple of 4"),
    ("new --out /proc/run", "", None, "cannot write a run into /proc/run"),
    ("new --out " + "a" * 300, "", None, "File name too long"),
    # Data that are missing or something else.
    ("new --dataset nmnist", "", None, "nmnist"),
    ("new", IMAGES, array(np.zeros((64, 3, 32, 32), np.uint8)), "must be uint8 [N, 32, 32, 3]"),
    ("new", IMAGES, array(np.zeros((0, 32, 32, 3), np.uint8)), "N > 0"),
    ("new", IMAGES, cut, "no readable .npy"),
    ("new", LABELS, array(np.zeros(64)), "must hold 64 whole numbers"),
    ("new", LABELS, array(np.full(64, 10)), "whole numbers from 0 to 9"),
    ("new", LABELS, array(np.full(64, Bomb())), "no readable .npy"),
    ("tree", "tree/val/dogs", lambda file: file.rename(file.parent / "hens"), "['dogs', 'hens']"),
    ("tree", "tree/val", shutil.rmtree, "no folder test or val"),
    ("tree", "tree/val/dogs/0.png", cut, "0.png: not a readable image"),
    ("tree --image-size 112", "tree/train/cats/0.png", text, "0.png: not a readable image"),
    # Checkpoints that are missing, cut off, of something else, or would run code.
    ("--resume nowhere", "", None, "last.pt cannot be read"),
    ("resume", "run/last.pt", cut, "it may be truncated"),
    ("resume", "run/last.pt", text, "it may be truncated, or no checkpoint of train.py"),
    ("resume", "run/last.pt", entries(format="other"), "is no checkpoint of train.py"),
    ("resume", "run/last.pt", entries(format=Bomb()), "last.pt cannot be read"),
    ("resume", "run/last.pt", flip, "its checksums do not fit"),
    ("resume", "run/last.pt", entries(folded=True), "or folded: for evaluation only"),
    ("resume", "run/last.pt", best, "is a best.pt or folded: for evaluation only"),
    ("resume --epochs 1", "", None, "is in epoch 2 already"),
    # A run goes on with its network and data, and no other takes its place.
    ("resume --arch resnet18", "", None, "has --arch resnet19, not resnet18"),
    ("resume --timesteps 4", "", None, "has --timesteps 2, not 4"),
    ("resume --optimizer adamw", "", None, "has --optimizer nesterov, not adamw"),
    ("resume --dataset cifar10", "", None, "has --dataset shapes, not cifar10"),
    ("new --out {d}/run", "run/last.pt", os.unlink, "holds a run (best.pt, log.csv)"),
    ("new --lr 1e30 --warmup 0", "", None, "NaN or infinite by step 8 of epoch 1"),
    ("resume --epochs 3", "run/last.pt", infinite, "such values: blocks.3.conv2.0 (Conv2d)"),
    ("resume --epochs 3", "run", full_disk, "cannot write"),
]
NEW = "--dataset cifar10 --data-dir {d}/data --recipe fast --width 4 --timesteps 2 --no-compile "
NEW += "--batch-size 8 --epochs 1 --workers 1 --out new"
TREE = NEW + " --dataset folder --data-dir {d}/tree --batch-size 2"
MEANING = dict(new=NEW, tree=TREE, resume="--resume {d}/run")


@pytest.mark.parametrize("flags, file, spoil, expected", BAD)
def test_bad_input_is_one_line(
        capsys, monkeypatch, trained, tmp_path, flags, file, spoil, expected):
    d = tmp_path / "d"
    shutil.copytree(trained, d / "run")
    tiny_run(d)
    image_tree(d / "tree", n=1, modes=("RGB", "L"))
    monkeypatch.chdir(tmp_path)
    if file:
        spoil(d / file)
    # The log, too, is written anew where a run goes on.
    before = {file: file.read_bytes() for file in d.rglob("*.[pn]*") if file.is_file()}
    first, *others = flags.split(" ", 1)
    flags = " ".join([MEANING.get(first, first), *others])
    fails(capsys, train, flags.format(d=d).split(), expected)
    # What was there is unchanged, no half of a file is left, and no code was run.
    assert all(file.read_bytes() == content for file, content in before.items())
    assert not list(tmp_path.rglob(".*")) and not os.path.exists("must-not-run")


@pytest.mark.parametrize("mode", ["plain", "fused"])
def test_memory_does_not_grow_over_2000_steps(request, mode):
    request.getfixturevalue(mode)
    model = small("", 10, timesteps=2, in_channels=3, width=4)
    optimizer, used = torch.optim.SGD(model.parameters(), 0.01), []
    x, y = torch.randn(2, 3, 4, 4), torch.arange(2)
    for _ in range(2000):
        optimizer.zero_grad()
        F.cross_entropy(model(x).mean(0), y).backward()
        optimizer.step()
        # Pages in memory, of 4 KiB.
        used.append(int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096)
    assert np.mean(used[-100:]) - np.mean(used[100:200]) < 8 * 2 ** 20
