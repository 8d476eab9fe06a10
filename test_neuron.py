"""Tests, a section per component. Run: python -m pytest -q test_neuron.py

They compare with something independent: a NumPy oracle whose backward pass is derived by hand, a
lemma of the paper, what the authors' code computes, a slow reader, a second process, a run that
was not interrupted.
"""
import concurrent.futures
import copy
import functools
import importlib.util
import math
import multiprocessing
import os
import pathlib
import pickle
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
# Programs that tests start find these files wherever they lie themselves. They have one thread as
# this process has, so that sums are taken in the same order.
os.environ.update(PYTHONPATH=str(HERE), OMP_NUM_THREADS="1")
torch.set_num_threads(1)


def python(*arguments, seconds=600):
    """The output of a Python program in a process of its own, which must end well."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=seconds)
    report = f"exit {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert done.returncode == 0, report
    return done.stdout


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


def settings_of(*flags):
    return train.parse([str(flag) for flag in flags])


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """Nothing is compiled unless a test asks for it, and runs in this process leave no trace."""
    monkeypatch.setattr(neuron, "COMPILE", False)
    # argparse takes the program's name from here.
    monkeypatch.setattr(sys, "argv", ["train.py"])
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)


@pytest.fixture
def fused(monkeypatch):
    """Fuse however small the input is, and fail where a layer falls back to the plain loop."""
    monkeypatch.setattr(neuron, "COMPILE", True)
    monkeypatch.setattr(neuron, "CPU_COMPILE_FROM", 0)
    yield
    assert neuron.COMPILE, "compiling failed: the plain loop ran"


# ---- neuron --------------------------------------------------------------------------------------

def oracle(x, g, v, theta, k, surrogate):
    """The neuron in NumPy, and the gradients of L = sum(g * spikes), derived by hand. x: currents
    [T, ...]. g: dL/dspikes, of the same shape. v: the potential before the first step."""
    h, s, before = np.zeros_like(x), np.zeros_like(x), np.zeros_like(x)
    v = np.full(x[0].shape, v)
    # Forwards. The potential leaks towards the current, and a spike takes theta away.
    for t in range(len(x)):
        before[t] = v
        h[t] = v + k * (x[t] - v)
        s[t] = h[t] >= theta
        v = h[t] - theta * s[t]
    # The surrogate derivatives of s are not 0 in a window around theta, whose edges belong to it.
    if surrogate == "trsg":
        # TrSG: s depends on the ratio r = h / theta, so the window is as wide as theta, and the
        # chain rule gives ds/dh = ds/dr / theta and ds/dtheta = -ds/dr h / theta^2.
        window = 1.0 * (abs(h / theta - 1) <= 0.5)
        ds_dh, ds_dtheta = window / theta, -window * h / theta**2
        # What is emitted is theta s, so theta enters L directly as well.
        height, gtheta = theta, (g * s).sum()
    else:
        # The naive form: s depends on the difference h - theta, and s itself is emitted.
        window = 1.0 * (abs(h - theta) <= 0.5)
        ds_dh, ds_dtheta = window, -window
        height, gtheta = 1.0, 0.0
    # Backwards. gv is dL/dv[t], which arrives from step t + 1: nothing comes after step T.
    gx, gk, gv = np.zeros_like(x), 0.0, np.zeros_like(v)
    for t in reversed(range(len(x))):
        # A spike is emitted and, in v[t] = h[t] - theta s[t], resets the potential.
        gs = height * g[t] - theta * gv
        gtheta += (gs * ds_dtheta[t] - gv * s[t]).sum()
        gh = gv + gs * ds_dh[t]
        # From h[t] = v[t-1] + k (x[t] - v[t-1]) to its three parts.
        gx[t] = k * gh
        gk += (gh * (x[t] - before[t])).sum()
        gv = (1 - k) * gh
    fired = s.any(0)
    return types.SimpleNamespace(spikes=height * s, v=v, fired=fired, gx=gx, gtheta=gtheta, gk=gk)


def as_numpy(tensor):
    return tensor.detach().double().cpu().numpy()


def assert_close(tensor, expected, tolerance):
    # Sums of many numbers cancel, so errors are measured by the largest of the expected values.
    atol = tolerance * np.abs(expected).max()
    np.testing.assert_allclose(as_numpy(tensor), expected, rtol=tolerance, atol=atol)


def channels_last(x):
    """[T, B, C, H, W] with the same values, its channels next to each other in memory."""
    folded = x.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    return folded.unflatten(0, x.shape[:2])


def check_against_oracle(layer, T, dtype, tolerance, shape=(3, 2, 4, 5), layout=lambda x: x):
    """Run a layer on three random batches, which `layout` puts into memory, and compare all that
    it computes. Returns the last spikes, the gradient of the last current, and v_init."""
    torch.manual_seed(T)
    # The parameters of a layer for bfloat16 stay in float32.
    if dtype == torch.float64:
        layer.double()
    theta, k, v_init = layer.threshold.item(), layer.decay.item(), layer.v_init.item()
    for _ in range(3):
        x, g = torch.randn(2, T, *shape).to(layer.v_init.device, dtype)
        # With currents of twice the threshold neurons fire often, but not always.
        x, g = layout(2 * theta * x).requires_grad_(), layout(g)
        layer.zero_grad()
        spikes = layer(x)
        spikes.backward(g)
        expected = oracle(as_numpy(x), as_numpy(g), v_init, theta, k, layer.surrogate)
        assert spikes.dtype == dtype and spikes.shape == x.shape
        assert_close(spikes, expected.spikes, tolerance)
        assert_close(x.grad, expected.gx, tolerance)
        # By theta = log(1 + exp(raw_threshold)) and k = sigmoid(raw_decay).
        assert_close(layer.raw_threshold.grad, expected.gtheta * (1 - math.exp(-theta)), tolerance)
        assert_close(layer.raw_decay.grad, expected.gk * k * (1 - k), tolerance)
        averaged = expected.fired if layer.mp_init == "active" else np.ones_like(expected.fired)
        if layer.training and layer.mp_init != "off" and averaged.any():
            v_init = 0.9 * v_init + 0.1 * expected.v[averaged].mean()
        assert_close(layer.v_init, v_init, tolerance)
        # The next batch starts from the layer's own v_init, or rounding errors would add up.
        v_init = layer.v_init.item()
    return spikes, x.grad, layer.v_init


@pytest.mark.parametrize("mp_init", ["active", "all", "off"])
@pytest.mark.parametrize("surrogate", ["trsg", "absolute"])
@pytest.mark.parametrize("theta, tau", [(0.25, 5), (2.5, 1.25)])
@pytest.mark.parametrize("T", [1, 5])
def test_outputs_and_gradients_equal_the_oracle(T, theta, tau, surrogate, mp_init):
    check_against_oracle(TrLIF(theta, tau, mp_init, surrogate), T, torch.float64, 1e-12)


DTYPES = [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
# Above 4096 neurons torch generates other kernels than below. Layers worth fusing lie above, and
# tests with this many neurons share what one of them has compiled.
LARGE = (16, 8, 9, 9)


@pytest.mark.parametrize("dtype, tolerance", DTYPES)
@pytest.mark.parametrize("surrogate", ["trsg", "absolute"])
def test_fused_equals_the_oracle(fused, surrogate, dtype, tolerance):
    check_against_oracle(TrLIF(surrogate=surrogate), 2, dtype, tolerance, LARGE)


@pytest.fixture(params=["plain", "fused"])
def mode(request):
    """A test with this argument runs twice: with the plain loop and with the fused one."""
    request.getfixturevalue(request.param)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("theta", [0.3, 1.0, 2.7])
def test_a_potential_exactly_at_the_threshold_spikes(mode, training, theta):
    layer = TrLIF(theta, tau=2).train(training)
    threshold = layer.threshold.detach()
    below = torch.nextafter(threshold, torch.tensor(0.0))
    # With tau = 2 a potential goes half the way from 0 to its current: exactly to the threshold
    # in every first neuron, to the next smaller number in every second.
    current = torch.stack([2 * threshold, 2 * below]).repeat(math.prod(LARGE))
    first, _ = layer(current.view(2, *LARGE)).flatten(1)
    assert first.view(-1, 2).unique(dim=0).tolist() == [[threshold.item(), 0.0]]


# The lemma of the paper. It does not hold for the naive form, which is why TrSG exists.
@pytest.mark.parametrize("c", [1e-3, 1e3])
def test_scaling_current_and_threshold_leaves_trsg_gradients_as_they_were(c):
    def spikes_and_gradients(scale, surrogate):
        torch.manual_seed(0)
        x, g = torch.randn(2, 4, 50).double()
        theta, v_init = (scale * torch.tensor([1.3, 0.2]).double()).unbind()
        x, theta, k = (scale * 2 * x).requires_grad_(), theta.requires_grad_(), torch.tensor(0.4)
        spikes = torch.stack(neuron.lif(x, v_init, theta, k, surrogate)[0])
        return spikes.detach(), *torch.autograd.grad(spikes, [x, theta], g)

    spikes, gx, gtheta = spikes_and_gradients(1.0, "trsg")
    spikes_c, gx_c, gtheta_c = spikes_and_gradients(c, "trsg")
    torch.testing.assert_close(spikes_c, c * spikes, rtol=1e-9, atol=0)
    torch.testing.assert_close((gx_c, gtheta_c), (gx, gtheta), rtol=1e-9, atol=1e-12)
    _, gx, gtheta = spikes_and_gradients(1.0, "absolute")
    _, gx_c, gtheta_c = spikes_and_gradients(c, "absolute")
    # By far more than rounding: gradients change by a third of their size and more.
    assert (gx_c - gx).norm() > 0.3 * gx.norm()
    assert abs(gtheta_c - gtheta) > 0.3 * abs(gtheta)


@pytest.mark.parametrize("deviation", [0.5, 1.0])
@pytest.mark.parametrize("mean", [0.5, 1.0])
def test_mp_init_halves_the_shift_between_early_and_late_steps(mean, deviation):
    torch.manual_seed(0)
    layer = TrLIF()
    # After 60 batches 0.9 ** 60 is left of the first v_init: less than 0.2 %.
    for _ in range(60):
        layer(mean + deviation * torch.randn(4, 5000))
    x = mean + deviation * torch.randn(50, 20000)

    def shift(v_init):
        theta, k = torch.tensor(1.0), torch.tensor(0.5)
        first, last = (neuron.lif(x[:steps], v_init, theta, k)[1] for steps in (1, 50))
        # The 1-Wasserstein distance between two samples of equal size.
        return (first.sort()[0] - last.sort()[0]).abs().mean()

    assert shift(layer.v_init) < 0.5 * shift(torch.tensor(0.0))


def test_v_init_is_saved_and_moved_by_batches_in_training_alone():
    layer, restored, x = TrLIF(), TrLIF(), torch.full((2, 5), 3.0)
    # Where nothing fires, there is no neuron to take the mean over.
    layer(-x)
    assert layer.v_init == 0
    layer(x)
    learnt = layer.v_init.clone()
    assert learnt > 0
    # A single bad current would spoil the mean. It gives a bad spike, and the mean stays.
    for bad in (math.inf, -math.inf, math.nan):
        spikes = layer(torch.cat([x, torch.full((2, 1), bad)], 1))
        assert layer.v_init == learnt
        assert spikes[:, :5].isfinite().all() and spikes[:, 5].isnan().all()
    layer.eval()(x)
    restored.load_state_dict(layer.state_dict())
    assert layer.v_init == learnt and restored.v_init == learnt


def test_half_precision_layers_average_in_float32():
    torch.manual_seed(0)
    # So many neurons fire that float16, which ends at 65504, could not count them.
    full, half, x = TrLIF(), TrLIF().half(), torch.randn(2, 64, 4096) + 1
    full(x)
    half(x.half())
    assert half.v_init.dtype == torch.float16
    assert half.v_init.item() == pytest.approx(full.v_init.item(), rel=1e-2)


def test_fixed_neurons_do_not_learn():
    layer = TrLIF(learnable=False)
    x = torch.randn(2, 100, requires_grad=True)
    layer(x).sum().backward()
    assert layer.raw_threshold.grad is None and layer.raw_decay.grad is None
    assert x.grad.any()


@pytest.mark.parametrize("theta, tau", [(1e-3, 1.001), (1.0, 2.0), (50.0, 1000.0)])
def test_threshold_and_tau_start_where_asked(theta, tau):
    # The way large models are built: shapes first, then memory, then values. NumPy's numbers are
    # float64, but must not make the layer float64.
    with torch.device("meta"):
        layer = TrLIF(np.float64(theta), np.float64(tau))
    assert "trsg" in repr(layer)
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert {value.dtype for value in layer.state_dict().values()} == {torch.float32}
    assert layer.v_init == 0
    layer.double()
    assert layer.threshold.item() == pytest.approx(theta, rel=1e-5)
    assert layer.tau.item() == pytest.approx(tau, rel=1e-3)


def batch_first(x):
    """[T, B, ...] as code with currents [B, T, ...] hands it over: transposed in memory."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("dtype, tolerance", DTYPES[1:])
def test_memory_format_is_kept_and_does_not_matter(mode, dtype, tolerance):
    results = []
    for layout in (torch.clone, channels_last, batch_first):
        results.append(check_against_oracle(TrLIF(), 2, dtype, tolerance, LARGE, layout))
    expected_spikes, expected_gradient, expected_v_init = results[0]
    assert expected_spikes.is_contiguous()
    assert results[1][0].flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    for spikes, gradient, v_init in results[1:]:
        assert torch.equal(spikes, expected_spikes) and torch.equal(gradient, expected_gradient)
        # The mean is summed in another order.
        torch.testing.assert_close(v_init, expected_v_init, rtol=1e-5, atol=1e-7)


def test_the_fused_loop_keeps_its_input_only_and_sums_over_rows_are_sums_over_the_layer():
    """The loop sees neurons as rows and columns: one row on a CPU, many rows on a GPU."""
    torch.manual_seed(0)
    x, g = torch.randn(2, 2, 96).double()
    start, theta, k = torch.tensor([0.1, 0.7, 0.4]).double()
    kept, results = [], []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    loop = neuron.lif_and_sums_recomputed
    for function, rows in ((loop, 1), (loop, 8), (loop, 96), (neuron.compiled(loop), 8)):
        kept.clear()
        inputs = [tensor.clone().requires_grad_() for tensor in (x.view(2, rows, -1), theta, k)]
        # torch calls `keep` with each tensor that it saves for the backward pass.
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            spikes, sums = function(inputs[0], start, *inputs[1:], "trsg", "active")
        besides = [tensor for tensor in kept if tensor.data_ptr() != inputs[0].data_ptr()]
        # The start, and a threshold and a decay for each row. No potentials of neurons.
        assert sum(tensor.numel() for tensor in besides) <= 1 + 2 * rows
        gx, gtheta, gk = torch.autograd.grad(spikes, inputs, g.view(2, rows, -1))
        results.append((spikes.flatten(), sums, gx.flatten(), gtheta, gk))
    # Some neurons fire.
    assert results[0][1][1] > 0 and results[0][3] != 0
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-12, atol=1e-12)


@pytest.fixture
def captures(fused, monkeypatch):
    """Forget what was compiled. Returns a function: how many graphs were compiled since. No code is
    generated, because these tests ask what is fused, and graphs run one by one compute the same."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **_: compiler(f, dynamic=True, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    neuron.compiled.cache_clear()
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    neuron.compiled.cache_clear()


# Five steps run in pieces of two, two and one.
@pytest.mark.parametrize("T, dtype", [(2, torch.float32), (2, torch.bfloat16), (5, torch.float32)])
@pytest.mark.parametrize("layout", [torch.clone, channels_last], ids=["contiguous", "nhwc"])
def test_changing_the_current_before_the_backward_pass_is_an_error(
        fused, monkeypatch, T, dtype, layout):
    monkeypatch.setattr(neuron, "STEPS_A_KERNEL", 2)
    layer, base = TrLIF(), layout(torch.randn(T, 2, 4, 5, 6)).to(dtype)

    def gradients(change_current, change_spikes):
        weight = torch.ones((), dtype=dtype, requires_grad=True)
        layer.eval().zero_grad()
        current = base * weight
        spikes = layer(current)
        change_current(current)
        change_spikes(spikes)
        spikes.sum().backward()
        return weight.grad, layer.raw_threshold.grad, layer.raw_decay.grad

    def nothing(_):
        pass

    # Changing the spikes is fine.
    expected = gradients(nothing, nothing)
    assert gradients(nothing, lambda spikes: spikes.add_(1)) == expected
    for change in (lambda x: x.add_(3), lambda x: F.relu(x, inplace=True), lambda x: x[0].zero_()):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradients(change, nothing)


def test_inference_mode_leaves_a_layer_that_can_be_trained(fused):
    layer, x = TrLIF(), torch.randn(2, 64, 90)
    with torch.inference_mode():
        # Statistics can be estimated again this way, and currents can be computed in advance.
        layer(x)
        cached = x.clone()
    assert layer.v_init != 0
    layer.load_state_dict(layer.state_dict())
    gradients = []
    for current in (x, cached):
        layer.eval().zero_grad()
        layer(current).square().sum().backward()
        gradients.append(layer.raw_threshold.grad.item())
    assert gradients[0] == gradients[1] != 0
    # The same in a network that is compiled as a whole.
    network = nn.Sequential(nn.Linear(90, 90), TrLIF())
    network.compile(backend="aot_eager", fullgraph=True)
    network(x).sum().backward()
    with torch.inference_mode():
        network(x)
    network.load_state_dict(network.state_dict())
    network(x).sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_is_an_error_in_training_only(mode, reentrant):
    def check_checkpointed(layer):
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=reentrant)
        layer.v_init += 0.2
        check_against_oracle(layer, 2, torch.float64, 1e-12, LARGE)

    # Neither of these moves v_init, so the layer computes the same when it runs again.
    check_checkpointed(TrLIF().eval())
    check_checkpointed(TrLIF(mp_init="off"))
    with pytest.raises(RuntimeError, match="no torch.utils.checkpoint in training"):
        check_checkpointed(TrLIF())


BAD_USE = [
    (lambda: TrLIF(threshold=0), "threshold must be above 0"),
    (lambda: TrLIF(threshold=math.nan), "threshold must be above 0"),
    (lambda: TrLIF(tau=1), "tau must be above 1"),
    (lambda: TrLIF(surrogate="sigmoid"), "must be 'trsg' or 'absolute', not 'sigmoid'"),
    (lambda: TrLIF(mp_init="mean"), "mp_init must be"),
    (lambda: TrLIF(momentum=2), "momentum must be"),
    (lambda: TrLIF()(torch.ones(2, 3, dtype=torch.int64)), "floating-point"),
    (lambda: TrLIF()(torch.ones(3)), r"\[T, B, ...\]"),
    (lambda: TrLIF()(torch.ones(0, 3)), "T >= 1"),
    (lambda: models.build("alexnet", 10, 1), "unknown arch 'alexnet'"),
    (lambda: models.build("resnet19", 0, 1), "num_classes"),
    (lambda: models.build("resnet19", 10, 0), "timesteps"),
    (lambda: models.build("resnet18", 10, 1, init="zeros"), "init must be one of published, "),
    (lambda: models.build("resnet18", 10, 1, init="identity"), "needs tau below 2, not 2"),
    (lambda: models.build("spikformer", 10, 1, init="identity"), "is for resnet18, resnet19 and"),
    (lambda: models.build("sew_resnet18", 10, 1, init="identity"), "is for resnet18, resnet19 and"),
]


@pytest.mark.parametrize("use, message", BAD_USE)
def test_bad_use_of_a_layer_or_network_is_explained_in_a_line(use, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        use()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("v_init, h, spikes", [
    (0.0, [0.8, 1.2, 0.9, 1.25], [0, 1, 0, 1]), (0.6, [1.1, 0.85, 1.225, 0.9125], [1, 0, 1, 0])])
def test_the_readmes_example(v_init, h, spikes):
    layer, x = TrLIF(threshold=1.0, tau=2.0).eval(), torch.full((4, 1), 1.6)
    layer.v_init.fill_(v_init)
    assert layer(x).flatten().tolist() == spikes
    for t in range(4):
        # The potential before firing is the one after it plus what a spike takes away.
        _, v, _ = neuron.lif(x[:t + 1], layer.v_init, layer.threshold, layer.decay)
        assert v.item() + spikes[t] == pytest.approx(h[t])


def test_the_file_works_without_its_second_part():
    # neuron.py says: in a copy, set COMPILE to False and delete all from "Speed" on.
    method = {}
    exec((HERE / "neuron.py").read_text().split("\n# ---- Speed")[0], method)
    method["COMPILE"] = False
    check_against_oracle(method["TrLIF"](), 4, torch.float64, 1e-12)


# The resnet has 17 layers of 5 shapes, spikformer 33 layers whose currents are views of many kinds.
@pytest.mark.parametrize("arch", ["resnet19", "spikformer"])
def test_few_compilations_serve_a_whole_training(captures, arch):
    model = models.build(arch, 10, timesteps=2, width=4)
    # The last batch of an epoch is smaller, in training and in evaluation.
    for batch in (8, 5, 3):
        model.train()(torch.randn(batch, 3, 32, 32)).sum().backward()
        with torch.no_grad():
            model.eval()(torch.randn(batch, 3, 32, 32))
    assert 0 < captures() <= 4


def test_long_sequences_run_fused_in_pieces(captures, monkeypatch):
    # Five steps are two, two and one.
    monkeypatch.setattr(neuron, "STEPS_A_KERNEL", 2)
    check_against_oracle(TrLIF(0.7, 3.0), 5, torch.float64, 1e-12)
    # One for the first piece, one for later pieces and one for the rest.
    assert 0 < captures() <= 3
    # A longer sequence has more pieces, but none of another kind.
    check_against_oracle(TrLIF(0.7, 3.0), 7, torch.float64, 1e-12)
    assert captures() <= 3


@pytest.mark.filterwarnings("ignore")
def test_tracers_transforms_and_mistakes_leave_the_fused_loop_on(captures):
    layer, x = TrLIF().eval(), 2 * torch.randn(3, 16, 5)
    programs = [
        torch.jit.trace(layer, x),
        torch.fx.experimental.proxy_tensor.make_fx(layer)(x),
        torch.export.export(layer, (x,)).module(),
        torch.func.vmap(layer, 2, 2),
    ]
    for program in programs:
        assert torch.equal(program(x), layer(x))
    current = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(layer(current).sum(), current)
    assert torch.equal(torch.func.grad(lambda current: layer(current).sum())(x), expected)
    # In training they would lose v_init, so torch refuses.
    with pytest.raises(RuntimeError, match="functorch|vmap|transform"):
        torch.func.vmap(layer.train(), 2, 2)(x)
    # A layer on another device than its input is a mistake with and without a compiler.
    with pytest.raises(RuntimeError, match="meta"):
        TrLIF().to("meta")(x)
    # Each new T still makes a graph of its own, which it would not if the loop ran eagerly.
    before = captures()
    for T in (4, 5):
        TrLIF()(torch.randn(T, 3, 5))
    assert captures() == before + 2


def test_what_cannot_be_compiled_runs_plain_with_one_warning(fused, monkeypatch):
    def broken(*_):
        raise RuntimeError("no compiler here\nand much more")

    monkeypatch.setattr(neuron, "run_compiled", broken)
    # The first line of the error is enough, and later calls do not try again.
    with pytest.warns(UserWarning, match="no compiler here$") as caught:
        check_against_oracle(TrLIF(), 4, torch.float64, 1e-12)
    assert len(caught) == 1 and not neuron.COMPILE
    # The fixture `fused` asks for this.
    neuron.COMPILE = True


# ---- models --------------------------------------------------------------------------------------

def neurons(model):
    return [module for module in model.modules() if isinstance(module, TrLIF)]


def weighted(model):
    return [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]


SIZES = [
    ("resnet19", 100, 12_548_294, 17),
    ("resnet19", 10, 12_502_124, 17),
    ("resnet18", 1000, 11_689_546, 17),
    ("resnet34", 1000, 21_797_738, 33),
    ("sew_resnet18", 1000, 11_689_552, 20),
    ("sew_resnet34", 1000, 21_797_744, 36),
    ("spikformer", 10, 9_324_796, 33),
]


@pytest.mark.parametrize("arch, classes, parameters, layers", SIZES)
def test_parameters_and_neurons(arch, classes, parameters, layers):
    # Tensors on the meta device have shapes, but no memory to fill.
    with torch.device("meta"):
        model = models.build(arch, classes, timesteps=1)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert len(neurons(model)) == layers


def train_and_log(model, optimizer, batches):
    """Train on batches of (images, labels). Returns the loss of each."""
    losses = []
    for images, labels in batches:
        loss = F.cross_entropy(model(images).mean(0), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_the_authors_trajectory_is_followed_to_rounding():
    """Five steps of SGD with the recipe of the paper, beside what the authors' code computes."""
    model = models.build("resnet19", 100, timesteps=2).double()
    # Weights and images come from NumPy's generator, so that other code can start from the same.
    rng = np.random.default_rng(11)
    for layer in weighted(model):
        bound = 1 / math.sqrt(layer.weight[0].numel())
        for parameter in layer.parameters():
            values = rng.uniform(-bound, bound, parameter.shape)
            parameter.data.copy_(torch.from_numpy(values))
    # The layers were made in float32. This makes their thresholds 1 to the digits of float64.
    layers = neurons(model)
    for layer in layers:
        nn.init.constant_(layer.raw_threshold, math.log(math.expm1(1)))
    rng = np.random.default_rng(12)
    x = torch.from_numpy(rng.standard_normal((5, 4, 3, 16, 16)))
    y = torch.from_numpy(rng.integers(0, 100, (5, 4)))
    settings = settings_of("--arch", "resnet19", "--dataset", "cifar100")
    optimizer = train.make_optimizer(model, settings)
    losses = train_and_log(model, optimizer, zip(x, y))
    with torch.no_grad():
        logits = model.eval()(x[0])[..., :10]
    # Every number below was computed by the authors' code.
    authors_losses = [4.614303774543373, 4.619991159773048, 4.615590041590323]
    authors_losses += [4.621456400120524, 4.594801515525382]
    np.testing.assert_allclose(losses, authors_losses, rtol=1e-12)
    sums = [
        (sum(layer.threshold.item() for layer in layers), 17.003682175673116),
        (sum(layer.tau.item() for layer in layers), 34.01675950947091),
        (sum(layer.v_init.item() for layer in layers), 2.8271501300654616),
        (logits.sum().item(), 0.0738711139737467),
        (logits.abs().sum().item(), 1.540800553657308),
        (sum(layer.weight.abs().sum().item() for layer in weighted(model)), 119422.77184386643),
    ]
    for value, authors_value in sums:
        np.testing.assert_allclose(value, authors_value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("arch", ["resnet19", "resnet18", "sew_resnet18"])
def test_weights_are_initialised_as_published(arch):
    torch.manual_seed(0)
    model, imagenet = models.build(arch, 1000, timesteps=1, width=16), arch != "resnet19"
    for layer in weighted(model):
        weight = layer.weight.detach()
        if not imagenet:
            # PyTorch's own way: uniform up to 1 / sqrt(fan_in), whose deviation is sqrt(3) smaller.
            bound = 1 / math.sqrt(weight[0].numel())
            deviation = bound / math.sqrt(3)
            assert weight.abs().max() <= bound * (1 + 1e-6)
        else:
            fan_out = weight.shape[0] * weight[0, 0].numel()
            deviation = 0.01 if layer is model.head else math.sqrt(2 / fan_out)
            # Of a normal distribution 4.6 % lie beyond two deviations, of a uniform one nothing.
            assert (weight.abs() > 2 * deviation).float().mean() > 0.03
        # The deviation of n numbers is known to about 1 / sqrt(n) of itself.
        assert weight.std().item() == pytest.approx(deviation, rel=4 / math.sqrt(weight.numel()))
    # The head's bias starts at 0 in ImageNet's networks, at random numbers in CIFAR's.
    assert ((model.head.bias == 0) == imagenet).all()


@pytest.mark.parametrize("tau", [1.25, 1.5])
def test_blocks_that_start_near_the_identity_pass_spikes_on(tau):
    torch.manual_seed(0)

    def passed_on(init):
        """The fraction of neurons of a plain block whose spikes are those on its shortcut."""
        model = models.build("resnet18", 10, timesteps=4, width=16, init=init, tau=tau)
        same = []
        model.blocks[1].register_forward_hook(
            lambda block, inputs, output: same.append((inputs[0] > 0) == (output > 0)))
        for _ in range(5):
            # MP-Init's means move away from 0.
            model(torch.randn(8, 3, 64, 64))
        return torch.stack(same).float().mean().item()

    assert passed_on("identity") > 0.99
    assert passed_on("kaiming") < 0.9


# A side of 28 pixels is halved to an odd number, 224 is that of ImageNet.
@pytest.mark.parametrize("arch", models.ARCHS)
@pytest.mark.parametrize("T, size", [(4, 28), (1, 224)])
def test_networks_run_forward_and_backward(arch, T, size):
    static = models.build(arch, 7, T, width=4)
    logits = static(torch.randn(2, 3, size, size))
    assert logits.shape == (T, 2, 7)
    logits.mean(0).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in static.parameters())
    # Event frames bring their own T, whatever the network was built for.
    events = models.build(arch, 7, 1, in_channels=2, width=4)
    assert events(torch.rand(2, T, 2, size, size)).shape == (T, 2, 7)


@pytest.mark.parametrize("arch", ["resnet19", "sew_resnet18", "spikformer"])
def test_a_static_image_equals_the_same_frame_at_every_step(arch):
    torch.manual_seed(0)
    # In training BatchNorm makes currents large enough for neurons to fire in front of the head.
    model = models.build(arch, 5, 3, width=4, mp_init="off").double()
    x = torch.randn(2, 3, 32, 32).double()
    logits, frames = model(x), torch.stack([x, x, x], 1)
    torch.testing.assert_close(model(frames), logits, rtol=1e-12, atol=1e-12)
    # Two images with the same logits would hide a mix-up of steps and images.
    assert (logits[:, 0] - logits[:, 1]).any()


def test_compiling_the_network_changes_rounding_only(monkeypatch):
    """20 training steps in float64, fused or not: the same losses and starts of potentials."""

    def losses_and_starts(fuse):
        monkeypatch.setattr(neuron, "COMPILE", fuse)
        torch.manual_seed(0)
        # One block, because compiling takes its time.
        model = models.ResNet(models.Block, [(4, 1, 1)], 10, 2, 3, 4, {}).double()
        if fuse:
            models.compile_model(model, fullgraph=True)
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        batches = [(x, torch.arange(8)) for x in torch.randn(20, 8, 3, 16, 16).double()]
        losses = train_and_log(model, optimizer, batches)
        return losses, [layer.v_init.item() for layer in neurons(model)]

    plain_losses, plain_starts = losses_and_starts(fuse=False)
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    losses, starts = losses_and_starts(fuse=True)
    # Otherwise the plain network would be compared with itself.
    assert graphs["unique_graphs"] > before
    assert losses[-1] < losses[0] and all(starts)
    np.testing.assert_allclose(losses, plain_losses, rtol=1e-6)
    np.testing.assert_allclose(starts, plain_starts, rtol=1e-6)


@pytest.mark.parametrize("arch", ["resnet19", "sew_resnet18"])
@pytest.mark.parametrize("surrogate", ["trsg", "absolute"])
@pytest.mark.parametrize("c", [0.25, 4.0])
def test_scaled_currents_make_the_threshold_a_unit(arch, surrogate, c):
    """The lemma through a network: with threshold and BatchNorms times c TrSG does the same."""

    def spikes_and_gradients(threshold):
        torch.manual_seed(0)
        model = models.build(arch, 10, 3, width=4, threshold=threshold, surrogate=surrogate)
        model.double()
        models.scale_currents(model, threshold)
        # The head has no BatchNorm, and reads theta s where TrSG is used.
        if surrogate == "trsg":
            model.head.weight.data /= threshold
        spikes = []
        # The layers were made in float32. This is the threshold to the digits of float64.
        for layer in neurons(model):
            nn.init.constant_(layer.raw_threshold, math.log(math.expm1(threshold)))
            layer.register_forward_hook(lambda layer, inputs, output: spikes.append(output != 0))
        # BatchNorm adds eps to a variance: the only number here that is not scaled.
        for module in model.modules():
            module.eps = 1e-14
        logits = model(torch.randn(8, 3, 16, 16).double())
        F.cross_entropy(logits.mean(0), torch.arange(8)).backward()
        return spikes, [layer.weight.grad for layer in weighted(model)[:-1]]

    spikes, gradients = spikes_and_gradients(1.0)
    spikes_c, gradients_c = spikes_and_gradients(c)
    if surrogate == "trsg":
        assert len(spikes) >= 17 and all(map(torch.equal, spikes, spikes_c))
        for gradient, expected in zip(gradients_c, gradients):
            atol = 1e-6 * expected.abs().max()
            torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=atol)
    else:
        # The fixed window of the naive form does notice: a gradient changes by a factor of e.
        factors = [after.norm() / before.norm() for before, after in zip(gradients, gradients_c)]
        assert torch.stack(factors).log().abs().max() > 1


@pytest.mark.parametrize("arch", ["resnet19", "spikformer"])
def test_neurons_under_autocast_equal_the_oracle(arch):
    """Convolutions in bfloat16, as on a GPU: what arrives at neurons is integrated exactly."""
    torch.manual_seed(0)
    model = models.build(arch, 10, 3, width=8, threshold=0.37, tau=1.7)
    records = []

    def record(layer, inputs, spikes):
        inputs[0].retain_grad()
        spikes.retain_grad()
        records.append((layer, inputs[0], spikes))

    for layer in neurons(model):
        layer.register_forward_hook(record)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.randn(4, 3, 32, 32))
    F.cross_entropy(logits.float().mean(0), torch.arange(4)).backward()
    for layer, x, spikes in records:
        assert x.dtype == torch.bfloat16
        theta, k = layer.threshold.item(), layer.decay.item()
        expected = oracle(as_numpy(x), as_numpy(spikes.grad), 0.0, theta, k, "trsg")
        # bfloat16 has 8 binary digits.
        np.testing.assert_allclose(as_numpy(spikes), expected.spikes, rtol=2**-8)
        assert_close(x.grad, expected.gx, 2e-2)
    # Zeros would equal zeros.
    assert sum(spikes.any().item() for _, _, spikes in records) > len(neurons(model)) / 2


# Networks with a block of each kind, one without and one with a convolution in its shortcut:
# deeper networks repeat these, and take long to export.
SHALLOW = {
    "resnet": functools.partial(models.ResNet, models.Block, [(4, 1, 1), (8, 1, 2)]),
    "spikformer": functools.partial(models.Spikformer, depth=1),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", SHALLOW)
def test_folded_networks_can_be_exported_for_any_batch_size(monkeypatch, kind, tmp_path):
    # As users have it. Inputs this small are not compiled.
    monkeypatch.setattr(neuron, "COMPILE", True)
    torch.manual_seed(0)
    # With low thresholds something fires in front of the head.
    common = dict(num_classes=10, timesteps=2, in_channels=3, width=4)
    model = SHALLOW[kind](**common, lif_options=dict(threshold=0.2))
    for _ in range(30):
        model(torch.randn(8, 3, 16, 16))
    folded = models.fold(model)
    batch = {0: torch.export.Dim("batch")}
    with torch.no_grad():
        x = torch.randn(4, 3, 16, 16)
        exported = torch.export.export(folded, (x,), dynamic_shapes=(batch,)).module()
        for n in (2, 4, 7):
            x = torch.randn(n, 3, 16, 16)
            logits = exported(x)
            torch.testing.assert_close(logits, model.eval()(x), rtol=1e-4, atol=1e-5)
            # Images of different pixels must not all get the same logits.
            assert torch.equal(logits, folded(x)) and (logits - logits[:, :1]).any()
    # The same through ONNX, where that is installed.
    if importlib.util.find_spec("onnxscript") and importlib.util.find_spec("onnxruntime"):
        import onnxruntime
        torch.onnx.export(folded, (x,), tmp_path / "net.onnx", dynamo=True, dynamic_shapes=(batch,))
        session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
        x = torch.randn(5, 3, 16, 16)
        (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        np.testing.assert_allclose(logits, folded(x).detach(), rtol=1e-4, atol=1e-5)


# Image sizes one after the other, as some train. On the meta device, which has no values, networks
# and layers take the way of a GPU.
@pytest.mark.parametrize("device, dynamic", [("cpu", None), ("meta", True)])
def test_networks_compile_in_one_graph_for_changing_shapes(fused, device, dynamic):
    # One neuron layer.
    network = models.ResNet(models.Block, [], 10, 2, 3, 4, {}).to(device)
    # fullgraph makes a graph break an error.
    how = dict(dynamic=dynamic, fullgraph=True, backend="aot_eager")
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    compiled = torch.compile(network, **how)
    for side in (16, 20, 24):
        compiled(torch.randn(2, 3, side, side, device=device)).sum().backward()
    layer = torch.compile(TrLIF().to(device).eval(), **how)
    for batch in (3, 5, 7):
        layer(torch.randn(4, batch, 8, 6, 6, device=device))
    # A graph each for network and layer. Without dynamic=True the second shape makes another.
    assert 0 < graphs["unique_graphs"] - before <= (2 if dynamic else 4)


def test_networks_take_synchronised_batchnorm():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(models.build("spikformer", 10, 2, width=4))
    assert model.eval()(torch.randn(2, 3, 16, 16)).shape == (2, 2, 10)
    models.scale_currents(model, 3.0)
    weights = [m.weight for m in model.modules() if isinstance(m, nn.SyncBatchNorm)]
    assert len(weights) == 29 and all((weight == 3).all() for weight in weights)


# The layer takes the place of another library's neuron in that library's networks.
@pytest.mark.filterwarnings("ignore")
def test_spikingjellys_networks_take_the_layer():
    library = "spikingjelly.activation_based"
    functional = pytest.importorskip(f"{library}.functional")
    resnet = pytest.importorskip(f"{library}.model.spiking_resnet").spiking_resnet18
    sew_resnet = pytest.importorskip(f"{library}.model.sew_resnet").sew_resnet18
    for build, options in ((resnet, {}), (sew_resnet, dict(cnf="ADD"))):
        network = build(spiking_neuron=TrLIF, num_classes=10, **options)
        # In its mode "m", for multi-step, layers get [T, B, ...].
        functional.set_step_mode(network, "m")
        network(torch.randn(2, 4, 3, 32, 32)).square().sum().backward()
        assert len(neurons(network)) >= 17
        for layer in neurons(network):
            assert layer.v_init != 0 and layer.raw_threshold.grad != 0


# ---- on a GPU (-k cuda) --------------------------------------------------------------------------

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@cuda
@pytest.mark.parametrize("layout", [lambda x: x, channels_last], ids=["contiguous", "nhwc"])
@pytest.mark.parametrize("dtype, tolerance", DTYPES[1:])
def test_cuda_layer_equals_the_oracle(fused, dtype, tolerance, layout):
    check_against_oracle(TrLIF().cuda(), 4, dtype, tolerance, LARGE, layout)


def cuda_step(monkeypatch, fuse, dtype):
    """(all gradients, those of the thresholds, peak bytes) of a training step of resnet19."""
    monkeypatch.setattr(neuron, "COMPILE", fuse)
    # TF32 would round what is called float32 to fewer digits.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = models.build("resnet19", 10, 4, width=32)
    # For bfloat16 weights stay in float32, and autocast rounds what is computed.
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
    args = train.parse(flags)
    model = models.compile_model(models.build("resnet19", 10, 2, width=8).cuda(), fullgraph=True)
    optimizer = train.make_optimizer(model, args)
    scaler = torch.amp.GradScaler("cuda", init_scale=1.0, growth_interval=2**30)
    x, y = torch.randn(64, 3, 32, 32, device="cuda"), torch.arange(64, device="cuda") % 10

    def step(i):
        return train.train_step(model, train.score, optimizer, scaler, x, y, args, (0, 0, i))

    # The first steps compile and may wait.
    totals = [step(i) for i in range(3)]
    # From here on torch raises an error where the program waits for the GPU.
    torch.cuda.set_sync_debug_mode("error")
    try:
        totals += [step(i) for i in range(10)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(totals).isfinite().all()


# ---- data ----------------------------------------------------------------------------------------

def small_set(pad=4, flip=True):
    """100 training and 37 test images of noise. The label of each is its number."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (137, 32, 32, 3), dtype=np.uint8)
    training, test = (images[:100], np.arange(100)), (images[100:], np.arange(37))
    # With this mean and deviation, normalising leaves every value as it is.
    mean, std = [0.0] * 3, [1 / 255] * 3
    return data.Resident("small", training, test, list(range(100)), mean, std, pad, flip)


def equal_sets(first, second):
    """Whether two data sets hold the same images and labels."""
    return all(torch.equal(*pair) for part in ("train", "test")
               for pair in zip(first.sets[part], second.sets[part]))


def test_augmentation_shifts_and_mirrors_each_image_in_its_own_way():
    dataset = small_set()
    padded = F.pad(dataset.sets["train"][0].permute(0, 3, 1, 2), (4, 4, 4, 4))
    # The 9 x 9 crops of each image: [image, channel, 9, 9, 32, 32].
    crops = padded.unfold(2, 32, 1).unfold(3, 32, 1)
    x, y = next(dataset.train(100, seed=3, epoch=0))
    assert sorted(y.tolist()) == list(range(100))
    ways = set()
    for image, label in zip(x, y):
        candidates = torch.stack([crops[label], crops[label].flip(-1)])
        found = (candidates == image[:, None, None]).all(-1).all(-1).all(1).nonzero()
        assert len(found) == 1
        ways.add(tuple(found[0].tolist()))
    # Many shifts, and mirrored images as well as others.
    assert len(ways) > 60 and {mirrored for mirrored, _, _ in ways} == {0, 1}


def test_frames_of_a_recording_move_together_and_digits_are_not_mirrored():
    frames = np.zeros((40, 3, 2, 34, 34), np.uint8)
    # In each recording a single pixel has events: 1 to 6, by frame and polarity.
    frames[:, :, :, 17, 10] = np.arange(1, 7).reshape(3, 2)
    both = [(frames, np.zeros(40))] * 2
    dataset = data.Resident("n", *both, ["0"], (0.0, 0.0), (1 / 255,) * 2, pad=5, flip=False)
    assert dataset.frames == 3 and dataset.channels == 2
    x, expected = next(dataset.train(40, 0, 0))[0], torch.from_numpy(frames).float()
    assert x.shape == expected.shape and torch.equal(x.amax((3, 4)), expected.amax((3, 4)))
    # The recording, row and column of every event: each recording has its events at one place.
    places = x.nonzero()[:, [0, 3, 4]].unique(dim=0)
    assert places[:, 0].tolist() == list(range(40))
    # Mirrored, column 10 would be column 23, farther off than any shift.
    shifts = places[:, 1:] - torch.tensor([17, 10])
    assert shifts.abs().max() <= 5 and len(shifts.unique(dim=0)) > 10
    # Test images stay where they are.
    assert torch.equal(next(dataset.test(40))[0], expected)


def test_batches_do_not_depend_on_history_or_on_the_number_of_processes():
    dataset = small_set()
    # 21 images do not divide by two processes.
    whole = list(dataset.train(21, seed=1, epoch=2))
    assert len(whole) == 4
    # A run that goes on at the third batch sees the last two of the unbroken one.
    for expected, batch in zip(whole[2:], dataset.train(21, 1, 2, start=2), strict=True):
        assert all(map(torch.equal, expected, batch))
    # Of two processes each sees every second image of each batch, treated alike.
    for rank in (0, 1):
        for (x, y), part in zip(whole, dataset.train(21, 1, 2, 0, rank, world=2), strict=True):
            assert torch.equal(x[rank::2], part[0]) and torch.equal(y[rank::2], part[1])
    # Every epoch has an order of its own.
    assert not torch.equal(whole[0][1], next(dataset.train(21, 1, epoch=3))[1])


@pytest.mark.parametrize("world, batch_size", [(1, 10), (2, 10), (3, 7), (4, 64)])
def test_every_test_image_is_seen_once(world, batch_size):
    dataset = small_set()
    parts = [list(dataset.test(batch_size, rank, world)) for rank in range(world)]
    # Processes wait for each other at every batch, so all need equally many.
    assert len({len(part) for part in parts}) == 1
    batches = sum(parts, [])
    assert all(len(y) == batch_size for _, y in batches)
    x, y = (torch.cat(tensors) for tensors in zip(*batches))
    # Label -1 marks what only fills up the last batch.
    order = y.argsort()[-37:]
    assert (y < 0).sum() == len(y) - 37 and y[order].tolist() == list(range(37))
    assert torch.equal(x[order], dataset.sets["test"][0].permute(0, 3, 1, 2).float())


def test_cifar_is_read_from_the_original_or_arrays_and_nothing_is_written(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), dtype=np.uint8)
    labels, original = np.array([0, 99, 3, 4, 5, 6, 7]), torchvision.datasets.CIFAR100
    # The original is pickled dictionaries that hold images as planes of colour.
    planes = images.transpose(0, 3, 1, 2).reshape(7, -1)
    contents = {"train": {"data": planes, "fine_labels": labels.tolist()},
                "test": {"data": planes[:2], "fine_labels": [0, 99]},
                "meta": {"fine_label_names": []}}
    (tmp_path / "cifar-100-python").mkdir()
    for name, content in contents.items():
        (tmp_path / "cifar-100-python" / name).write_bytes(pickle.dumps(content))
    # torchvision is not to compare these files with the checksums of the real ones.
    changes = dict(train_list=[["train", None]], test_list=[["test", None]],
                   meta={**original.meta, "md5": None}, url="http://127.0.0.1:9/nowhere")
    for name, value in changes.items():
        monkeypatch.setattr(original, name, value)
    before = sorted(tmp_path.rglob("*"))
    dataset = data.load("cifar100", tmp_path)
    assert sorted(tmp_path.rglob("*")) == before and len(dataset) == 7
    x, y = next(dataset.test(2))
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (dataset.mean, dataset.std))
    torch.testing.assert_close(x, (torch.tensor(images[:2]).permute(0, 3, 1, 2) / 255 - mean) / std)
    assert y.tolist() == [0, 99]
    # Prepared arrays serve without the original.
    folder = tmp_path / "arrays/cifar100"
    folder.mkdir(parents=True)
    for path, array in zip(data.array_paths(folder), (images, labels, images[:2], labels[:2])):
        np.save(path, array)
    assert equal_sets(dataset, data.load("cifar100", tmp_path / "arrays"))
    message = r"^cifar100 is not in [^\n]* cannot be downloaded [^\n]*nowhere[^\n]*$"
    with pytest.raises(data.UserError, match=message):
        data.load("cifar100", tmp_path / "other")


def image_tree(root, n=3, modes=("RGB", "L", "RGBA", "P")):
    """n dark cats and n bright dogs of each mode for training, and as many for validation."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(("cats", "dogs")):
        for folder in (root / "train" / name, root / "val" / name):
            folder.mkdir(parents=True)
            for i, mode in enumerate(modes * n):
                # Every second image is larger and WebP, which knows no palette (mode P).
                size, ending = ((64, 64), "webp") if i % 2 else ((40, 50), "png")
                pixels = rng.integers(0, 80, (*size, 3)) + 150 * label
                image = Image.fromarray(pixels.astype(np.uint8)).convert(mode)
                image.save(folder / f"{i}.{'png' if mode == 'P' else ending}")
    return root


@pytest.mark.parametrize("size, kind", [(24, data.Resident), (112, data.Streamed)])
def test_a_folder_of_images_of_every_mode(tmp_path, size, kind):
    image_tree(tmp_path)
    # What macOS, Jupyter and the usual preparation of ImageNet leave behind is no part of the set:
    # hidden files, and images of the test set without classes.
    (tmp_path / "train/cats/._0.png").write_bytes(b"\0\5\26\7")
    for place in ("train", "train/dogs", "val"):
        shutil.copytree(tmp_path / "val/cats", tmp_path / place / ".ipynb_checkpoints")
    shutil.copytree(tmp_path / "val/cats", tmp_path / "test/unlabelled")
    # Nor is a folder an image, whatever its name.
    (tmp_path / "train/cats/holiday.jpg").mkdir()
    dataset = data.load("folder", tmp_path, image_size=size, workers=1).to("cpu")
    assert isinstance(dataset, kind) and dataset.classes == ["cats", "dogs"] and len(dataset) == 24
    batches = list(dataset.train(8, 0, 0))
    assert len(batches) == 3
    for x, y in batches:
        assert x.shape == (8, 3, size, size) and x.isfinite().all()
        # The dogs, class 1, are the bright ones.
        assert ((x.mean((1, 2, 3)) > 0) == (y == 1)).float().mean() > 0.7
    rest = dataset.train(8, 0, 0, start=1, rank=1, world=2)
    for (x, y), part in zip(batches[1:], rest, strict=True):
        assert torch.equal(x[1::2], part[0]) and torch.equal(y[1::2], part[1])
    labels = torch.cat([y for _, y in dataset.test(10)])
    assert labels.tolist() == [0] * 12 + [1] * 12 + [-1] * 6

    def crops(epoch):
        return {image.numpy().tobytes() for x, _ in dataset.train(8, 0, epoch) for image in x}

    # Another epoch crops large images in another way. Small ones have shifts that may come again.
    assert kind is data.Resident or crops(0).isdisjoint(crops(1))


@pytest.mark.parametrize("size, parts", [
    (24, "train val test"), (112, "train val test"), (24, "train test"), (112, "train val")])
def test_all_of_train_is_trained_on_and_all_of_val_or_else_test_is_evaluated(
        tmp_path, size, parts):
    # Each image has a grey value of its own.
    greys, values = iter(range(10, 250, 3)), {}
    for part in parts.split():
        for path in (tmp_path / part / name / f"{i}.png" for name in "ab" for i in range(8)):
            path.parent.mkdir(parents=True, exist_ok=True)
            values.setdefault(part, []).append(next(greys))
            Image.new("RGB", (30, 30), (values[part][-1],) * 3).save(path)
    dataset = data.load("folder", tmp_path, image_size=size, workers=0).to("cpu")

    def seen(batches):
        # The brightest value, because shifted images have a black margin.
        reds = torch.cat([x[y >= 0, 0].amax((1, 2)) for x, y in batches])
        return (255 * (reds * dataset.std[0] + dataset.mean[0])).round().int().tolist()

    assert sorted(seen(dataset.train(4, 0, 0))) == values["train"]
    assert seen(dataset.test(5)) == values["val" if "val" in parts else "test"]


def test_reading_a_whole_set_keeps_no_batch_open():
    items = [(np.full((2, 2), i % 256, np.uint8), i) for i in range(5000)]
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    # 200 batches follow, and a batch from a worker holds two files open.
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 100, limit[1]))
    try:
        arrays, labels = data.read_all(items, range(5000), 1, "items")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert labels.tolist() == list(range(5000)) and np.array_equal(arrays[:, 1, 1], labels % 256)


def test_worker_processes_outlive_signals_but_not_the_program():
    # Ctrl-C reaches the workers as well and must not end them: after it there are still two. They
    # end with their loader, which a process of the program's own survives. Of the second loader not
    # all batches are taken, so its workers are still at work when the program ends.
    script = """
import multiprocessing, os, signal, time
import data
own = multiprocessing.Process(target=time.sleep, args=(600,), daemon=True)
own.start()
def loader():
    return data.worker_batches(range(60), [[number] for number in range(60)], workers=2)
batches = loader()
# The first two batches show that both workers are ready.
numbers = [next(batches).item(), next(batches).item()]
for worker in {*multiprocessing.active_children()} - {own}:
    os.kill(worker.pid, signal.SIGINT)
    os.kill(worker.pid, signal.SIGTERM)
numbers += [next(batches).item() for _ in range(50)]
print(numbers == list(range(52)), len(multiprocessing.active_children()))
batches.close()
print(multiprocessing.active_children() == [own])
batches = loader()
next(batches)
"""
    assert python("-c", script, seconds=60) == "True 3\nTrue\n"


def test_two_writers_of_one_file_write_it_whole(tmp_path):
    path = tmp_path / "new/file"

    def write_200_times(letter):
        found = set()
        for _ in range(200):
            data.write_atomically(path, lambda file: file.write(letter * 5000))
            found.add(path.read_bytes())
        return found

    # Threads have the same process number, as processes of two containers may have.
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        found = set().union(*pool.map(write_200_times, (b"a", b"b")))
    assert found == {b"a" * 5000, b"b" * 5000} and os.listdir(path.parent) == ["file"]


def test_a_failed_write_leaves_the_old_file_and_a_new_one_has_usual_permissions(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, -1))
    with pytest.raises(data.UserError, match="cannot write .*file"):
        data.write_atomically(path, lambda file: file.write(bytes(1000)))
    resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    # Ctrl-C while writing.
    with pytest.raises(KeyboardInterrupt):
        data.write_atomically(path, lambda file: signal.raise_signal(signal.SIGINT))
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]
    usual = os.umask(0o027)
    try:
        data.write_atomically(path, lambda file: file.write(b"new"))
        (tmp_path / "other").touch()
    finally:
        os.umask(usual)
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


# ---- events --------------------------------------------------------------------------------------

HEADER = b"#!AER-DAT2.0\r\n# This is a raw AE data file\r\n# Timestamps tick: 1 us\r\n"
# Recordings of your own are compared, too, where this variable names their folder.
RECORDINGS = sorted(pathlib.Path(os.environ.get("DVS_RECORDINGS", "/nowhere")).glob("*.aedat"))


def slow_read(path):
    """An AEDAT 2.0 recording one event at a time, from the format's description: t, x, y, p."""
    raw, position = pathlib.Path(path).read_bytes(), 0
    while raw[position:position + 1] == b"#":
        position = raw.index(b"\n", position) + 1
    t, x, y, p, clock, last = [], [], [], [], 0, None
    while position < len(raw):
        address, stamp = struct.unpack(">II", raw[position:position + 8])
        # A fall by more than half of the range is no disorder: the 32 bits ran over.
        if last is not None and last - stamp > 2**31:
            clock += 2**32
        last, position = stamp, position + 8
        t.append(clock + stamp)
        x.append(127 - address // 256 % 128)
        y.append(127 - address // 2 % 128)
        p.append(0 if address % 2 else 1)
    return t, x, y, p


def slow_bin(t, x, y, p, frames, height, width, by):
    """Frames of events that are counted one at a time."""
    counts = np.zeros((frames, 2, height, width), np.int64)
    share, first, length = len(t) // frames, min(t), max((max(t) - min(t)) // frames, 1)
    for i in range(len(t)):
        if by == "time":
            slot = (t[i] - first) // length
        else:
            slot = i // share if share else frames - 1
        # What the division leaves over belongs to the last frame.
        counts[min(slot, frames - 1), p[i], y[i], x[i]] += 1
    return counts


def aedat(addresses, times):
    """An AEDAT 2.0 recording of these words, as bytes. Its clock has 32 bits."""
    return HEADER + np.stack([addresses, np.mod(times, 2**32)], 1).astype(">u4").tobytes()


CLOCKS = {
    "rising": np.sort(np.random.default_rng(0).integers(0, 10**6, 997)),
    "empty slices": np.r_[np.arange(500), 10**6 + np.arange(497)],
    "equal": np.full(997, 5),
    "wraps": 2**32 - 500 + 2 * np.arange(997),
    "less time than slices": np.arange(997) // 200,
    "fewer events than slices": np.array([7, 9, 9]),
    "set back": np.r_[np.arange(1000, 1500), np.arange(900, 1397)],
}


@pytest.mark.parametrize("case", [*CLOCKS, *map(str, RECORDINGS)])
def test_events_and_frames_equal_a_slow_reader_and_binner(case, tmp_path):
    path = pathlib.Path(case)
    if case in CLOCKS:
        path = tmp_path / "a.aedat"
        addresses = np.random.default_rng(1).integers(0, 2**15, len(CLOCKS[case]))
        path.write_bytes(aedat(addresses, CLOCKS[case]))
    expected, events = slow_read(path), data.read_aedat(path)
    assert [values.dtype for values in events] == [np.int64, np.int16, np.int16, np.int16]
    assert all(map(np.array_equal, expected, events))
    for by in ("count", "time"):
        for frames in (1, 4, 10):
            counts = data.bin_events(*events, frames=frames, height=128, width=128, by=by)
            assert counts.dtype == np.uint16
            assert np.array_equal(counts, slow_bin(*expected, frames, 128, 128, by))
    # Written and read again, they are what they were.
    data.write_aedat(tmp_path / "again.aedat", *events)
    assert all(map(np.array_equal, events, data.read_aedat(tmp_path / "again.aedat")))


def test_header_ends_where_the_number_sign_does_and_triggers_are_no_events(tmp_path):
    # The bytes of these events look like text, even like lines of a header. Between them stand two
    # external triggers, which bit 15 marks, whatever the other bits are.
    texts = b"#abc", b"tick", b"\n#hi", b"tock", b"x\r\n#"
    stamps = [int.from_bytes(text, "big") for text in texts]
    (tmp_path / "a.aedat").write_bytes(aedat([0x410A, 0x8000, 0x2323, 0x9234, 0x0A23], stamps))
    t, x, y, p = (values.tolist() for values in data.read_aedat(tmp_path / "a.aedat"))
    assert t == stamps[::2]
    assert (x, y, p) == ([62, 92, 117], [122, 110, 110], [1, 0, 0])


def test_bin_events_saturates_and_refuses_what_lies_outside():
    # More events on a single pixel than a 16-bit number can count.
    many, none = np.zeros(70000, np.int64), np.zeros(0, np.int64)
    assert data.bin_events(many, many, many, many, 1, 2, 2)[0, 0, 0, 0] == 65535
    assert not data.bin_events(none, none, none, none, 3, 2, 2, "time").any()
    # Of two columns, rows and polarities, 1 is the last.
    last = np.array([1])
    for x, y, p in ((2, 1, 1), (1, 2, 1), (1, 1, 2), (-1, 1, 1)):
        with pytest.raises(ValueError, match="outside"):
            data.bin_events(last, last * x, last * y, last * p, 1, 2, 2)
    for frames, by in ((0, "count"), (1, "number")):
        with pytest.raises(ValueError):
            data.bin_events(last, last, last, last, frames, 2, 2, by)


def test_nmnist_events_equal_a_slow_reader(tmp_path):
    raw = np.random.default_rng(3).integers(0, 256, (400, 5))
    raw[:, :2] %= 34
    # Row 240 is the mark of a clock that has run over.
    raw[[100, 101, 300], 1] = 240
    (tmp_path / "1.bin").write_bytes(raw.astype(np.uint8).tobytes())
    expected, later = [], 0
    for x, y, c, d, e in raw.tolist():
        later += 8192 if y == 240 else 0
        if y != 240:
            expected.append((((c % 128 * 256 + d) * 256 + e) + later, x, y, c // 128))
    assert np.array_equal(np.stack(data.read_nmnist(tmp_path / "1.bin"), 1), expected)
    assert len(expected) == 397 and later == 3 * 2**13


def slow_area_mean(frames, size):
    """Means over size x size areas, from pixels cut so finely that no part lies in two areas."""
    n = frames.shape[-1]
    cuts = size // math.gcd(n, size)
    side = n * cuts // size
    parts = frames.repeat(cuts, -2).repeat(cuts, -1)
    return parts.reshape(*frames.shape[:-2], size, side, size, side).mean((-3, -1))


@pytest.mark.parametrize("n, size", [(128, 48), (128, 32), (34, 34), (5, 3)])
def test_area_mean_equals_splitting_every_pixel(n, size):
    frames = np.random.default_rng(4).integers(0, 60, (3, 2, n, n))
    assert np.allclose(data.area_mean(frames, size), slow_area_mean(frames, size), atol=1e-4)


@pytest.mark.parametrize("name, raw", [
    # Nothing, another kind of file, a newer version of the format.
    ("cifar10-dvs", b""), ("cifar10-dvs", b"PK\x03\x04" + bytes(60)),
    ("cifar10-dvs", b"#!AER-DAT3.1\r\n" + bytes(80)),
    # No event, a header without end, an event without end, nothing but a trigger.
    ("cifar10-dvs", HEADER), ("cifar10-dvs", HEADER + b"# no end"),
    ("cifar10-dvs", aedat([5, 5], [1, 2])[:-3]), ("cifar10-dvs", aedat([0x8000], [1])),
    # Addresses beyond those of a DVS128, the second with the mark of a trigger.
    ("cifar10-dvs", aedat([5, 0x10001], [1, 2])), ("cifar10-dvs", aedat([5, 0x18000], [1, 2])),
    # Nothing, an event without end, only a mark of the clock, places beyond 34 x 34 pixels.
    ("nmnist", b""), ("nmnist", bytes(7)), ("nmnist", b"\0\xf0\0\0\0"),
    ("nmnist", bytes([34, 0, 0, 0, 0])), ("nmnist", bytes([0, 34, 0, 0, 0]))])
def test_bad_recordings_give_one_line_with_the_name(name, raw, tmp_path):
    path = tmp_path / "bad name.bin"
    path.write_bytes(raw)
    recordings = data.Recordings(data.EVENT_SETS[name], [path], [0], 4, "count")
    with pytest.raises(data.UserError, match=r"^[^\n]*bad name.bin: [^\n]*replace it[^\n]*$"):
        recordings[0]


def write_recordings(root, numbers, inside="{name}", n=300):
    """Write recordings of n events with these numbers of each class; return the set's folder."""
    for label, name in enumerate(data.CIFAR10):
        folder = root / "cifar10-dvs" / inside.format(name=name)
        folder.mkdir(parents=True, exist_ok=True)
        # macOS leaves such files beside others. They are no recordings.
        (folder / f"._cifar10_{name}_0.aedat").write_bytes(b"hidden")
        for number in numbers:
            rng = np.random.default_rng((label, number))
            events = aedat(rng.integers(0, 2**15, n), np.sort(rng.integers(0, 10**6, n)))
            (folder / f"cifar10_{name}_{number}.aedat").write_bytes(events)
    return root / "cifar10-dvs"


def test_folders_and_zip_files_give_the_same_arrays_wherever_they_lie(tmp_path):
    folder = write_recordings(tmp_path / "usual", (0, 1, 100))
    for name in data.CIFAR10:
        shutil.make_archive(tmp_path / "zipped/cifar10-dvs" / name, "zip", folder, name)
    write_recordings(tmp_path / "doubled", (0, 1, 100), "{name}/{name}")
    write_recordings(tmp_path / "deep", (0, 1, 100), "bird/extract/{name}")
    dataset = data.load("cifar10-dvs", tmp_path / "usual", workers=0)
    for layout, workers in (("zipped", 1), ("doubled", 0), ("deep", 0)):
        assert equal_sets(dataset, data.load("cifar10-dvs", tmp_path / layout, workers=workers))
    assert dataset.split == "first100" and dataset.classes == data.CIFAR10
    assert dataset.size == (48, 48) and len(dataset.sets["test"][1]) == 20
    assert dataset.sets["train"][1].tolist() == list(range(10))
    # The network sees events per pixel, rounded to sixteenths. Cat 0 is the seventh recording.
    events = data.read_aedat(folder / "cat/cifar10_cat_0.aedat")
    expected = slow_area_mean(data.bin_events(*events, 4, 128, 128), 48)
    cat = next(dataset.test(20))[0][6].numpy()
    assert abs(cat - expected).max() <= 0.5 / 16 + 1e-6
    # The names of the prepared files tell how the frames were made.
    paths = data.array_paths(folder, "_T4_count_48_first100")
    assert sorted(folder.glob("*.npy")) == sorted(paths)


def test_folders_named_train_and_test_divide_nmnist(tmp_path):
    # The innermost such folder decides, in any case. Other folders, longer words and the names of
    # files decide nothing.
    paths = {"Train/{}/test_00001.bin": 0, "train/latest/{}/2.bin": 0,
             "Test/TRAIN/{}/contest_7.bin": 0, "Test/pretrained/{}/1.bin": 1,
             "Train/{}/test/2.bin": 1, "x/TEST/train.d/{}/3.bin": 1}
    for path, part in paths.items():
        for digit in range(10):
            file = tmp_path / "nmnist" / path.format(digit)
            file.parent.mkdir(parents=True, exist_ok=True)
            # A test digit has one event, in the column of its own number; a training digit two.
            file.write_bytes(bytes([digit, 2, 128, 0, 0]) * (2 - part))
    dataset = data.load("nmnist", tmp_path, timesteps=1, workers=0)
    assert dataset.split == "official" and not dataset.flip
    assert len(dataset) == dataset.test_size() == 30
    for part, events in (("train", 2), ("test", 1)):
        images, labels = dataset.sets[part]
        assert images.flatten(1).sum(1).tolist() == [events] * 30
        assert images[torch.arange(30), 2, labels, 1].tolist() == [events] * 30
    # A recording in neither could belong to the test set.
    shutil.move(tmp_path / "nmnist/Test/pretrained", tmp_path / "nmnist/other")
    with pytest.raises(data.UserError, match="other/0/1.bin lies in no folder named Train or Test"):
        data.load("nmnist", tmp_path, timesteps=1, workers=0)


def test_frames_are_made_again_where_recordings_have_changed(tmp_path, capsys):
    load = functools.partial(data.load, "cifar10-dvs", tmp_path, timesteps=2, workers=0)
    write_recordings(tmp_path, (0, 100))
    assert len(load()) == 10
    folder = write_recordings(tmp_path, (101, 102))
    more = load()
    assert len(more) == 30 and capsys.readouterr().out.count("making frames again") == 1
    # Others of the same names, with an event more.
    write_recordings(tmp_path, (0, 100, 101, 102), n=301)
    others = load()
    assert capsys.readouterr().out.count("making frames again") == 1
    assert not equal_sets(more, others)
    # The same recordings as before are not read again, and without any the frames alone serve.
    assert equal_sets(load(), others)
    for name in data.CIFAR10:
        shutil.rmtree(folder / name)
    assert equal_sets(load(), others) and capsys.readouterr().out == ""


def test_a_folder_that_cannot_be_written_serves(tmp_path, capsys):
    folder = write_recordings(tmp_path, (0, 100))
    load = functools.partial(data.load, "cifar10-dvs", tmp_path, timesteps=2, workers=0)
    before = sorted(folder.rglob("*"))
    # No file may grow beyond 0 bytes.
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, -1))
    dataset = load()
    resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    (folder / "source_T2_count_48_first100.txt").unlink()
    assert sorted(folder.rglob("*")) == before
    out = capsys.readouterr().out
    assert "cannot write" in out and "make these frames again" in out and out.count("\n") == 1
    assert equal_sets(dataset, load())


def test_sets_are_split_by_number_or_by_lot():
    recordings = [(label, i, f"{label}_{i}", 0, 0) for label in range(10) for i in range(1000)]
    first, drawn, again = (data.test_part(recordings, split).reshape(10, 1000)
                           for split in ("first100", "random", "random"))
    assert first[:, :100].all() and not first[:, 100:].any()
    assert np.array_equal(drawn, again) and not np.array_equal(drawn, first)
    # A tenth of each class, and other numbers in each.
    assert drawn.sum(1).tolist() == [100] * 10 and len(np.unique(drawn, axis=0)) == 10
    # Where each recording lies there twice, both copies are on the same side.
    copies = sorted(recordings + [(label, i, f"again/{path}", 0, 0)
                                  for label, i, path, *_ in recordings])
    twice = data.test_part(copies, "random").reshape(10, 1000, 2)
    assert np.array_equal(twice, np.stack([drawn, drawn], 2))


def test_what_is_wrong_with_a_set_is_one_line(tmp_path):
    def refuses(expected, split="random"):
        with pytest.raises(data.UserError, match=rf"^[^\n]*{expected}[^\n]*$"):
            data.load("cifar10-dvs", tmp_path, dvs_split=split, workers=2)
        # Left behind, worker processes would keep the program from ending.
        assert not multiprocessing.active_children()

    refuses("cifar10-dvs has no recordings of class airplane.*figshare")
    folder = write_recordings(tmp_path, (0, 1))
    refuses("unknown split 'last'", "last")
    refuses("first100 makes 20 of 20", "first100")
    # Bad recordings are found by a worker process.
    os.truncate(folder / "cat/cifar10_cat_1.aedat", 500)
    refuses("cat_1.aedat: .*ends in the middle")
    (folder / "cat/cifar10_cat_1.aedat").write_bytes(aedat([5, 0x12345], [1, 2]))
    refuses("cat_1.aedat: address 0x12345")
    # Bad archives and missing classes are found before any recording is read.
    shutil.make_archive(folder / "dog", "zip", folder, "dog")
    (folder / "dog/cifar10_dog_1.aedat").unlink()
    refuses("dog holds 1 recordings, .*dog.zip 2: delete the folder")
    (folder / "dog.zip").unlink()
    shutil.rmtree(folder / "horse")
    refuses("no recordings of class horse")
    (folder / "horse.zip").write_bytes(b"<html>not found</html>")
    refuses("horse.zip cannot be unpacked")


def test_a_killed_preparation_leaves_nothing_half_done_and_starts_again(tmp_path, monkeypatch):
    def unpack_a_file_and_die(archive, place, members):
        archive.extract(members[0], place)
        os.kill(os.getpid(), signal.SIGKILL)

    def write_half_and_die(file, array, allow_pickle):
        file.write(array.tobytes()[:1000])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    folder = write_recordings(tmp_path, range(4))
    shutil.copytree(folder, tmp_path / "new/cifar10-dvs")
    shutil.make_archive(folder / "cat", "zip", folder, "cat")
    shutil.rmtree(folder / "cat")
    load = functools.partial(data.load, "cifar10-dvs", dvs_split="random", workers=0)
    unpacking = (zipfile.ZipFile, "extractall", unpack_a_file_and_die)
    writing = (np, "save", write_half_and_die)
    for death in (unpacking, writing):
        assert not (folder / "cat").exists()
        # A copy of this process, which need not import everything again.
        process = multiprocessing.get_context("fork").Process(target=load, args=[tmp_path])
        with monkeypatch.context() as patch:
            patch.setattr(*death)
            process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
    # What was left behind begins with a dot and is not looked at.
    assert not list(folder.glob("[!.]*.npy")) and len(list(folder.glob(".*/*.npy"))) == 1
    assert equal_sets(load(tmp_path), load(tmp_path / "new"))


# ---- training and evaluation ---------------------------------------------------------------------

# Processes are forks of one that has imported everything, which saves each of them the seconds
# that importing torch takes.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__])


def in_forks(*calls, code=0):
    """Make calls (function, arguments ...) at once, each in a process that must exit with code."""
    processes = [FORKS.Process(target=function, args=arguments) for function, *arguments in calls]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
        # One that waits for another would outlive the tests.
        process.kill()
    assert [process.exitcode for process in processes] == [code] * len(processes)


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
    arrays.mkdir(parents=True, exist_ok=True)
    for part, n in (("train", 64), ("test", n_test)):
        np.save(arrays / f"{part}_images.npy", rng.integers(0, 256, (n, 32, 32, 3), np.uint8))
        np.save(arrays / f"{part}_labels.npy", (np.arange(n) % 10).astype(np.uint8))
    flags = "--dataset cifar10 --recipe fast --width 4 --timesteps 2 --batch-size 8 --epochs 3"
    return [*flags.split(), "--no-compile", "--data-dir", str(folder / "data")]


@pytest.fixture
def tiny(tmp_path):
    return lambda n_test=16: tiny_run(tmp_path, n_test)


@pytest.fixture(scope="module")
def run_and_data(tmp_path_factory):
    """A folder with arrays, a tree of images, and a run of two epochs on the arrays."""
    folder = tmp_path_factory.mktemp("run")
    image_tree(folder / "tree", n=1, modes=("RGB", "L"))
    flags = [*tiny_run(folder), "--epochs", "2", "--out", str(folder / "run")]
    in_forks((train.main, flags))
    return folder


def small(arch, num_classes, timesteps, in_channels, width, init=None, stages=(), **options):
    """In the place of models.build: one convolution and neuron layer, compiled in seconds, or a
    few blocks."""
    shape = num_classes, timesteps, in_channels, width
    return models.ResNet(models.Block, stages, *shape, options)


def weights(file):
    return torch.load(file, weights_only=True)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def log(out):
    """The rows of a run's log.csv without its times."""
    lines = (out / "log.csv").read_text().splitlines()
    assert lines[0].endswith(",images_per_s,seconds")
    return [line.split(",")[:-2] for line in lines]


def test_training_writes_log_and_checkpoints(run_and_data):
    run = run_and_data / "run"
    header, *rows = log(run)
    assert header == "epoch lr train_loss train_acc test_acc_t1 test_acc_t2".split()
    assert [row[0] for row in rows] == ["1", "2"]
    # No temporary file is left.
    assert {file.name for file in run.iterdir()} == {"log.csv", "last.pt", "best.pt"}
    # Checkpoints count epochs from 0. The last epoch ended with its eighth step.
    last = train.load_checkpoint(run / "last.pt")
    assert (last["epoch"], last["step"]) == (1, 8)
    # Only last.pt is for training on, which needs the state of the optimizer.
    assert "optimizer" in last and "optimizer" not in train.load_checkpoint(run / "best.pt")


def test_a_seed_gives_the_same_run_everywhere(capsys, monkeypatch, run_and_data, tmp_path):
    x, logits = torch.randn(8, 3, 32, 32), []

    def note_logits(model, *_):
        logits.append(model.eval()(x))
        return {"top1": 0.0, "top1_at": [0.0, 0.0]}

    # The run of `run_and_data` once more, in this process, and with another seed. In the place of
    # its evaluation the network at the end of each epoch is asked for the logits of some noise.
    monkeypatch.setattr(train, "evaluate", note_logits)
    flags, run = [*tiny_run(run_and_data), "--epochs", 2], run_and_data / "run"
    for seed in (0, 1):
        printed(capsys, train, *flags, "--seed", seed, "--out", tmp_path / str(seed))
    there = weights(run / "last.pt")
    assert same(there, weights(tmp_path / "0/last.pt"))
    assert not same(there, weights(tmp_path / "1/last.pt"))
    # Epoch, learning rate, loss and accuracy in training.
    assert [row[:4] for row in log(run)] == [row[:4] for row in log(tmp_path / "0")]
    # The other process's checkpoint is the very network that this one has trained.
    loaded = train.build_network(train.load_checkpoint(run / "last.pt"))
    assert torch.equal(loaded(x), logits[1])
    # That includes the initial potential of each of the 17 neuron layers.
    potentials = [value for name, value in there.items() if name.endswith("v_init")]
    assert len(potentials) == 17 and any(v != 0 for v in potentials)


def test_evaluation_agrees_with_the_log(capsys, run_and_data):
    run = run_and_data / "run"
    said = printed(capsys, evaluation, run / "last.pt", "--data-dir", run_and_data / "data")
    at1, at2 = (100 * float(accuracy) for accuracy in log(run)[-1][-2:])
    for expected in (f"top-1 {at2:.2f} %", f"t=1: {at1:.2f} %", "of 16 images"):
        assert expected in said


def test_the_learning_rate_warms_up_and_falls_to_zero():
    args = types.SimpleNamespace(lr=0.4, warmup=0.1)
    rates = [train.learning_rate(step, 100, args) for step in range(100)]
    # Ten of the hundred steps lead to the peak, in equal steps.
    assert rates[:10] == pytest.approx([0.04 * (step + 1) for step in range(10)])
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] < 1e-3


def test_the_papers_recipe_is_the_default():
    args = settings_of()
    paper = dict(arch="resnet19", width=64, epochs=200, batch_size=64, optimizer="sgd", lr=0.02)
    paper.update(warmup=0, weight_decay=5e-4, init="published", label_smoothing=0, mixup=0)
    assert paper.items() <= vars(args).items()
    optimizer = train.make_optimizer(models.build("resnet19", 10, 2, width=4), args)
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
        found.update(dict.fromkeys(group["params"], (group["lr_scale"], group["weight_decay"])))
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


def test_flags_reach_the_network_and_the_data(shapes):
    flags = "--dataset shapes --width 4 --threshold 2 --tau 3 --surrogate absolute --mp-init off "
    flags += "--fixed-neuron --scale-currents --classes 3"
    args = settings_of(*flags.split())
    dataset = train.make_dataset(args, train.Processes("cpu"))
    _, model = train.make_model(args, dataset, "cpu")
    assert dataset.classes == data.SHAPES[:3] and model.head.out_features == 3
    assert (model.stem[1].weight == 2).all()
    layer = model.lif
    assert (layer.surrogate, layer.mp_init) == ("absolute", "off")
    assert [layer.threshold.item(), layer.tau.item()] == pytest.approx([2, 3])
    # Thresholds and time constants, the parameters without dimensions, are not trained.
    for group in train.make_optimizer(model, args).param_groups:
        assert all(parameter.dim() > 0 for parameter in group["params"])


@pytest.mark.parametrize("failing", [None, "training", "evaluation"])
def test_a_network_is_compiled_or_else_its_neurons(capsys, monkeypatch, tiny, tmp_path, failing):
    def compile_model(model, **_):
        def call(x):
            if model.training == (failing == "training"):
                raise RuntimeError("no compiler here\nand much more")
            return model.forward(x)

        model._compiled_call_impl = call

    monkeypatch.setattr(models, "build", small)
    if failing:
        monkeypatch.setattr(models, "compile_model", compile_model)
    # Neurons that are so few are not fused.
    monkeypatch.setattr(neuron, "CPU_COMPILE_FROM", 2**40)
    flags, rows, states = [*tiny(), "--epochs", 1, "--limit", 8], [], []
    for fuse in ("off", "network"):
        said = printed(capsys, train, *flags, "--compile", fuse, "--out", tmp_path / fuse)
        rows.append(log(tmp_path / fuse)[1])
        states.append(weights(tmp_path / fuse / "last.pt"))
    # The first line of the error is enough.
    line = "The network cannot be compiled here, only its neurons are: no compiler here\n"
    assert said.count("cannot be compiled") == said.count(line) == (failing is not None)
    assert "much more" not in said and neuron.COMPILE
    # Compiling takes a trial step, which must leave nothing behind in weights and statistics.
    # Without a compiler the result is that of the plain run to the bit.
    assert same(*states) or not failing
    torch.testing.assert_close(*states, rtol=1e-3, atol=1e-4)
    # The third column is the loss, the fourth the accuracy in training.
    off, network = rows
    assert float(off[2]) == pytest.approx(float(network[2]), abs=2e-5) and off[3] == network[3]


def test_parts_of_a_step_add_up_to_the_whole():
    torch.manual_seed(0)
    x, y = torch.randn(16, 3, 8, 8, dtype=torch.float64), torch.arange(16) % 10
    # The means of BatchNorm and MP-Init would be those of a part, so they are left out.
    model = models.build("resnet19", 10, 2, width=4, mp_init="off").double().train()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()
            nn.init.constant_(layer.weight, 2.0)
    states, totals = [], []
    for parts in (1, 4):
        args, learner = settings_of("--no-amp", "--accumulate", parts), copy.deepcopy(model)
        optimizer, scaler = train.make_optimizer(learner, args), torch.amp.GradScaler("cpu")
        for step in range(3):
            sums = train.train_step(
                learner, train.score, optimizer, scaler, x, y, args, (0, 0, step)
            )
        states.append(learner.state_dict())
        totals.append(sums)
    torch.testing.assert_close(*states, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(*totals, rtol=1e-5, atol=0)
    assert not same(states[0], model.state_dict())


@pytest.mark.parametrize("mixup", [0.0, 0.5])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixup_and_label_smoothing_by_hand(mixup, smoothing):
    torch.manual_seed(0)
    x, y, linear, seen = torch.randn(6, 12), torch.tensor([0, 4, 3, 3, 1, 2]), nn.Linear(12, 5), []

    def model(images):
        seen.append(images)
        # Two time steps, whose mean is 2.
        return torch.stack([linear(images), 3 * linear(images)])

    args = settings_of("--no-amp", "--mixup", mixup, "--label-smoothing", smoothing)
    optimizer, scaler = torch.optim.SGD(linear.parameters(), 0.0), torch.amp.GradScaler("cpu")
    sums = train.train_step(model, train.score, optimizer, scaler, x, y, args, (0, 0, 0))
    # Every image is mixed with the one as far from the other end, all by the same weight.
    other = x.flip(0)
    weight = ((seen[0] - other) / (x - other)).median().item()
    assert 0 < weight < 1 if mixup else weight == 1
    torch.testing.assert_close(seen[0], weight * x + (1 - weight) * other)
    # The probability that each class should get, by image.
    one_hot = np.eye(5)[y]
    wanted = weight * one_hot + (1 - weight) * one_hot[::-1]
    wanted = (1 - smoothing) * wanted + smoothing / 5
    logits = 2 * linear(seen[0]).detach().double().numpy()
    e = np.exp(logits)
    loss = -(wanted * np.log(e / e.sum(1, keepdims=True))).sum()
    assert sums.tolist() == pytest.approx([loss, (logits.argmax(1) == y.numpy()).sum(), 6])


def train_shapes(flags, out):
    """Three epochs of small drawn shapes with a network of four blocks."""

    def build(width, **options):
        stages = [(2 * width, 1, 2), (4 * width, 1, 2)]
        model = small(width=width, stages=stages, **options)
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        return model

    models.build = build
    flags += " --dataset shapes --image-size 16 --epochs 3 --no-compile --out"
    train.main([*flags.split(), str(out)])


def test_three_epochs_teach_the_shapes_and_mp_init_raises_the_first_step(tmp_path):
    # The last two with the same images in the same order and the same initial weights.
    narrow = "--width 8 --timesteps 2 --lr 0.1 --mp-init "
    runs = dict(wide="--width 16 --timesteps 1", active=narrow + "active", off=narrow + "off")
    in_forks(*((train_shapes, flags, tmp_path / name) for name, flags in runs.items()))
    wide, active, off = (log(tmp_path / name)[-1] for name in runs)
    # About 97 %. A linear classifier of pixels stays near 10 %.
    assert float(wide[-1]) > 0.9
    # After the first step by seed (0, 1, 2) 83, 75, 73 % with MP-Init, and 64, 56, 60 % without.
    assert float(active[-2]) > float(off[-2]) + 0.05


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
    model = models.build(arch, num_classes=10, timesteps=2, init="kaiming", **options).double()
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
    for layer in neurons(model):
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


def checkpoint_file(path, arch="resnet19", *flags):
    """A checkpoint of a network of width 4 with random weights, as train.py would write it."""
    network = dict(arch=arch, num_classes=10, timesteps=2, in_channels=3, width=4)
    settings = vars(settings_of("--dataset", "shapes", "--no-amp", *flags))
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


@pytest.mark.parametrize("size", [24, 112])
def test_some_images_are_drawn_from_all_classes_and_classes_left_out(tmp_path, size):
    # One set that lies in memory and one that is read as it comes, both of 40 cats, then 40 dogs.
    image_tree(tmp_path, n=20, modes=("RGB", "L"))
    dataset = data.load("folder", tmp_path, size, 0).to("cpu")
    whole = list(evaluation.test_batches(dataset, 100))
    dataset.limit("test", 30, "--images")
    (x, y), = evaluation.test_batches(dataset, 100)
    # They are always the same: the places that a first permutation begins with.
    chosen = torch.randperm(80, generator=data.random_generator(0))[:30]
    assert torch.equal(x, whole[0][0][chosen]) and torch.equal(y, whole[0][1][chosen])
    assert 8 < y.sum() < 22
    # Batches come without padding.
    assert [len(x) for x, _ in evaluation.test_batches(dataset, 20)] == [20, 10]
    with pytest.raises(data.UserError, match="--images 31 is more than the 30 test images"):
        dataset.limit("test", 31, "--images")
    with pytest.raises(data.UserError, match="--classes 3 is more than the 2 classes of folder"):
        dataset.keep_classes(3)
    dataset.keep_classes(1)
    assert dataset.classes == ["cats"] and len(dataset) == 40
    assert torch.cat([y for _, y in dataset.train(4, 0, 0)]).tolist() == [0] * 40
    cats = 30 - int(y.sum())
    assert torch.cat([y for _, y in dataset.test(5)]).tolist() == [0] * cats + [-1] * (-cats % 5)
    dataset.limit("train", 5, "--limit")
    assert len(dataset) == 5 and len(list(dataset.train(2, 0, 0))) == 2


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
        # Spikes in, accumulates, multiply-accumulates, and those of an ANN.
        # The image is analog and multiplied once for both steps.
        "stem": (0, 0, (2 + 3 + 3 + 3 + 2) ** 2, (2 + 3 + 3 + 3 + 2) ** 2),
        # A 1 x 1 kernel for three channels, which misses the lit place in row 3.
        "blocks.0.shortcut": (4, 3 * 3, 0, 3 * 9),
        "blocks.0.conv1": (4, 3 * (1 * 1 + 1 * 1 + 1 * 1 + 2 * 1), 0, 3 * (1 + 2 + 1 + 2 + 1) ** 2),
        # Here (0, 0), (0, 1), (1, 1), (1, 2) and (2, 2) saw a spike and fire in all channels.
        "blocks.0.conv2": (3 * 5, 3 * 3 * (4 + 6 + 9 + 6 + 4), 0, 3 * 3 * (2 + 3 + 2) ** 2),
        # All nine places fire. The head of an ANN reads the mean over them.
        "head": (3 * 9, 3 * 9 * 4, 0, 3 * 4),
    }
    assert [row["layer"] for row in rows] == list(expected)
    for row, (spikes, acs, macs, ann_macs) in zip(rows, expected.values()):
        assert (row["spikes"], row["acs"]) == (spikes, acs), row["layer"]
        assert (row["macs"], row["ann_macs"]) == (macs, ann_macs), row["layer"]
        # The energy of an accumulate and of a multiply-accumulate in pJ.
        assert row["pj"] == pytest.approx(0.9 * acs + 4.6 * macs)
        assert row["ann_pj"] == pytest.approx(4.6 * ann_macs)


@pytest.mark.parametrize("arch", SIDES)
@pytest.mark.parametrize("events", [False, True])
def test_operations_count_every_spike_of_a_folded_network(arch, events):
    """Exactly what enters each layer of the folded network, residual streams included."""
    model, x, expected = randomised(arch, events), noise(arch, 8, events), {}
    folded = models.fold(model)
    found = flows(folded, x)
    for name, layer in folded.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear, models.Scale)):
            # Where every weight is 1, a spike adds 1 for each of its connections.
            ones = copy.deepcopy(layer)
            nn.init.ones_(ones.weight)
            ones.bias = None
            expected[name] = ones(found[name][0]).sum().item() / len(x)
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
        # The head of an ANN reads each mean once.
        assert rows["head"]["ann_macs"] == model.head.weight.numel()
        if arch == "spikformer":
            # Each of 64 tokens multiplies the 2 channels of k with the 2 of v, in 12 heads.
            assert rows["attention.1 k^T v"]["ann_macs"] == 64 * 12 * 2 * 2
        if arch == "resnet19":
            # A plain shortcut has no weights in an ANN.
            assert rows["blocks.1.shortcut"]["ann_macs"] == 0
        if not events:
            # The values of an image are analog: a multiplication for each connection.
            stem = rows.pop("patches.0" if arch == "spikformer" else "stem")
            assert stem["macs"] == stem["ann_macs"] > 0
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
        elif sends or (receives and name not in ("stem", "patches.0")):
            spikes = leaving if sends else entering
            assert ((spikes == 0) | (spikes == 1)).all(), name
            fires.append(spikes.any())
    assert sum(fires) > 0.9 * len(fires)
    # The original is untouched.
    for layer in neurons(model):
        assert layer.surrogate == surrogate


# The borders of a histogram's bins, in thresholds.
EDGES = np.linspace(-evaluation.RANGE, evaluation.RANGE, evaluation.BINS + 1)


def test_wasserstein_from_histograms():
    rng = np.random.default_rng(0)
    samples = rng.normal(0.3, 0.7, 20000), rng.gamma(2.0, 0.5, 20000) - 1
    counts = [evaluation.histogram(2.5 * torch.from_numpy(v), theta=2.5) for v in samples]
    for v, found in zip(samples, counts):
        # Rounding may move a value across an edge, which changes the counts of two bins.
        assert (found - torch.from_numpy(np.histogram(v, EDGES)[0])).abs().sum() <= 4
    # Between samples of equal size the distance is that of the sorted values.
    exact = np.abs(np.sort(samples[0]) - np.sort(samples[1])).mean()
    distance = evaluation.wasserstein(*counts).item()
    assert abs(distance - exact) <= 1 / evaluation.BINS_PER_THRESHOLD


@pytest.mark.parametrize("start", [None, 0.0])
def test_potentials_are_those_of_the_neurons(start):
    model, x, steps = randomised("resnet19"), noise("resnet19", 4), 10
    _, found = evaluation.potentials(model, batches_of(x, 3), model.timesteps, steps, start)
    # The first layer once more, after arXiv:2511.08708. Its current is the same at all steps.
    current, theta, k = flows(model, x)["stem"][1], model.lif.threshold, model.lif.decay
    v, expected = model.lif.v_init if start is None else start, []
    for _ in range(steps):
        h = v + k * (current - v)
        v = h - theta * (h >= theta)
        expected.append((v / theta).detach())
    # Both of the network's steps, and the last two together. More images take no more memory.
    expected = [*expected[:2], torch.stack(expected[-2:])]
    assert found["lif"].shape == (3, evaluation.BINS)
    for counts, values in zip(found["lif"], expected, strict=True):
        exact = torch.from_numpy(np.histogram(values, EDGES)[0])
        assert counts.sum() == exact.sum() == values.numel()
        # Rounding may move a value across an edge.
        assert evaluation.wasserstein(counts, exact) < 1e-4


def test_potentials_of_recordings_are_those_of_their_frames_repeated():
    model, x = randomised("resnet19", events=True), noise("resnet19", 4, events=True)
    result, found = evaluation.potentials(model, batches_of(x, 4), T=2, steps=10)
    # The frames 0, 1, 0, 1, ... as a recording of its own.
    repeated = batches_of(x.repeat(1, 5, 1, 1, 1), 4)
    assert result == train.evaluate(model, repeated)
    _, expected = evaluation.potentials(model, repeated, T=10, steps=10)
    for name, counts in found.items():
        assert torch.equal(counts[:2], expected[name][:2])
        # The last row holds the last two steps together.
        assert torch.equal(counts[2], expected[name][8] + expected[name][9])
    # The frames differ, and so do the potentials.
    assert not torch.equal(found["lif"][0], found["lif"][1])


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
    # The file by itself gives the accuracies that were printed when it was written.
    again = printed(capsys, evaluation, saved, "--images", 64, "--batch-size", 16)
    assert again.partition("read out")[2].splitlines()[0] in said and "folded" in again
    fails(capsys, evaluation, [saved, "--save-folded", saved], "folded already")
    # A folded network may be replaced, a checkpoint of training not.
    printed(capsys, evaluation, path, "--save-folded", saved, "--images", 2)
    fails(capsys, evaluation, [path, "--save-folded", path], "is not a folded network")


def test_a_comparison_has_the_rows_of_each_network_alone(capsys, shapes, tmp_path):
    (tmp_path / "run").mkdir()
    checkpoint_file(tmp_path / "run/best.pt")
    # The folder of a run stands for its best.pt.
    files = [tmp_path / "run", checkpoint_file(tmp_path / "b.pt", "sew_resnet18")]
    flags = ["--images", 8, "--batch-size", 3]
    both = printed(capsys, evaluation, *files, *flags)
    for file in files:
        alone = printed(capsys, evaluation, file, *flags)
        row = next(line for line in alone.splitlines() if line.startswith(f"| {file}"))
        # Columns may have other widths.
        assert row.split() in [line.split() for line in both.splitlines()]
    # The study of potentials takes long and is not asked for.
    assert "run/best.pt" in both and "potentials" not in both


def test_reports_and_pictures(capsys, monkeypatch, shapes, tmp_path):
    pytest.importorskip("matplotlib")
    # Only for speed. What these numbers must be is tested below.
    monkeypatch.setattr(evaluation, "gradient_norm", lambda *case: 1.0)
    without = checkpoint_file(tmp_path / "b.pt", "sew_resnet18", "--mp-init", "off")
    files = [checkpoint_file(tmp_path / "a.pt"), without]
    report = tmp_path / "r.md"
    # The last batch is smaller than the others.
    flags = ["--images", 3, "--batch-size", 2, "--inspect", "--report", report]
    flags += ["--plot", tmp_path / "p.png", "--picture", tmp_path / "methods.png"]
    said, text = printed(capsys, evaluation, *files, *flags), report.read_text()
    assert text.startswith("# Summary\n\n") and "nan" not in text
    assert text.removeprefix("# Summary\n\n") in said
    assert text.count("## Temporal covariate shift") == 2
    assert "blocks.7.lif2" in text and "4.6 pJ" in text
    printed(capsys, evaluation, "--picture", tmp_path / "toy.png")
    # Labels of the wrong network would be worse than none.
    fails(capsys, evaluation, ["--picture", tmp_path / "x.png", *files[::-1]], "trained with MP-In")
    for name in ("p.png", "p-2.png", "methods.png", "toy.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("own, other", [("--amp", "--no-amp"), ("--no-amp", "--amp")])
def test_precision_is_that_of_training_unless_told(capsys, shapes, tmp_path, own, other):
    file, found = checkpoint_file(tmp_path / "a.pt", "resnet19", own), set()

    def note_dtype(layer, inputs, output):
        if isinstance(layer, nn.Conv2d):
            found.add(output.dtype)

    for flag, amp in ([], own), ([other], other):
        found.clear()
        with nn.modules.module.register_module_forward_hook(note_dtype):
            said = printed(capsys, evaluation, file, *flag, "--images", 1)
        dtype = torch.bfloat16 if amp == "--amp" else torch.float32
        assert f"computed in {str(dtype).removeprefix('torch.')}\n" in said and found == {dtype}
    # Nor may a GPU round what is computed in float32.
    assert not torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"


def test_gradients_keep_their_size_with_trsg_only():
    spread = {}
    for surrogate in ("trsg", "absolute"):
        norms = [evaluation.gradient_norm(surrogate, theta) for theta in (0.1, 1.0, 10.0)]
        spread[surrogate] = max(norms) / min(norms)
    assert spread["trsg"] < 1.5 and spread["absolute"] > 1e3


def test_speed_has_a_row_for_each_size(capsys, monkeypatch):
    # So small that nothing is compiled.
    monkeypatch.setattr(evaluation, "NEURONS", {"cpu": (8, 64)})
    monkeypatch.setattr(evaluation, "SECONDS", 0.01)
    said = printed(capsys, evaluation, "--speed", "--device", "cpu")
    assert "\n| 8 " in said and "\n| 64 " in said


@pytest.mark.parametrize("arguments, expected", [
    ("a.pt --plot p.png", "pictures need matplotlib: pip install matplotlib"),
    ("", "no checkpoint given"),
    ("a.pt b.pt --save-folded c.pt", "takes one checkpoint"),
    ("a.pt --picture m.png", "--picture takes two checkpoints"),
    ("a.pt", "a.pt cannot be read"),
    ("a.pt --device nonsense", "--device nonsense cannot be used"),
    ("--plot a.pt", "does not end in .png"),
    ("--report a.pt b.pt", "does not end in .md")])
def test_mistakes_are_found_before_the_work(capsys, monkeypatch, arguments, expected):
    # None of the files exists, so that work on them would end with another message. Importing
    # matplotlib fails as if it were not installed.
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    fails(capsys, evaluation, arguments.split(), expected)


# ---- several processes ---------------------------------------------------------------------------

def environments_of_two():
    """What torchrun tells each of two processes in its environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    return [dict(common, RANK=rank, LOCAL_RANK=rank) for rank in "01"]


def train_five_steps(environment, arch, fused, file):
    """Train on this process's part of five batches, and save the state of the network."""
    os.environ.update(environment)
    # Whatever is to be fused is fused however small it is.
    neuron.CPU_COMPILE_FROM = 0
    processes = train.Processes("cpu")
    torch.manual_seed(0)
    small_resnet = models.ResNet(models.Block, [(8, 1, 1)], 10, 2, 3, 4, {})
    model = small_resnet if arch == "small" else models.build(arch, 10, 2, width=4)
    model.double().train()
    for layer in model.modules():
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            # Half a batch has other statistics than the whole: the running ones are used, while
            # weights still train. They start at 2 for many spikes.
            layer.eval()
            nn.init.constant_(layer.weight, 2.0)
    if fused == "network":
        models.compile_model(model)
    world = processes.world
    how = types.SimpleNamespace(compile="off" if fused == "plain" else "neurons")
    trained, _ = train.make_fast(model, None, how, processes)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        x = torch.randn(8, 3, 32, 32, generator=generator, dtype=torch.float64)
        y = torch.randint(0, 10, (8,), generator=generator)
        part = slice(processes.rank, None, world)
        loss = F.cross_entropy(trained(x[part]).mean(0), y[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # No layer ran unfused because compiling it failed.
    assert neuron.COMPILE == (fused != "plain")
    # After an epoch all have the statistics of the first process, and the totals of both.
    norm = nn.BatchNorm1d(3)
    norm.running_mean += 5 + processes.rank
    norm.running_var += 7 + processes.rank
    processes.equalise(norm)
    assert norm.running_mean.tolist() == [5.0] * 3 and norm.running_var.tolist() == [8.0] * 3
    assert processes.total(torch.tensor([1.0, 2.0])).tolist() == [world, 2.0 * world]
    if processes.rank == 0:
        torch.save(model.state_dict(), file)
    processes.leave(0)


@pytest.mark.parametrize(
    "arch, fused",
    [("resnet19", "plain"), ("spikformer", "plain"), ("resnet19", "neurons"), ("small", "network")],
)
def test_two_processes_equal_one_with_the_whole_batch(tmp_path, arch, fused):
    files = tmp_path / "alone.pt", tmp_path / "together.pt"
    first, second = environments_of_two()
    in_forks(
        (train_five_steps, {}, arch, "plain", files[0]),
        (train_five_steps, first, arch, fused, files[1]),
        (train_five_steps, second, arch, fused, files[1]),
    )
    alone, together = (torch.load(file, weights_only=True) for file in files)
    # There are mean potentials, which processes have to add up.
    assert any(v.abs() > 1e-3 for name, v in alone.items() if name.endswith("v_init"))
    for name, value in alone.items():
        torch.testing.assert_close(value, together[name], rtol=1e-8, atol=1e-8, msg=name)


def test_torchrun_trains_and_counts_every_test_image_once(tiny, tmp_path):
    # 17 test images do not divide by two. Threads of compiled neurons and of the connection must
    # not crash an interpreter that ends, for which torchrun would exit with 1.
    flags = [*tiny(17), *"--epochs 1 --limit 16 --compile neurons --out".split(), tmp_path / "run"]
    # The first stage's currents, steps x images x channels x places, are just enough to compile.
    assert 2 * 4 * 8 * 32 * 32 >= neuron.CPU_COMPILE_FROM
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node 2 train.py"
    assert "% at best" in python(*torchrun.split(), *flags)
    model = train.build_network(train.load_checkpoint(tmp_path / "run/last.pt"))
    result = train.evaluate(model, data.load("cifar10", tmp_path / "data").to("cpu").test(5))
    assert result["images"] == 17
    assert log(tmp_path / "run")[-1][-2:] == [f"{top1:.5f}" for top1 in result["top1_at"]]


def test_a_mistake_that_the_first_process_finds_ends_both(tiny, tmp_path):
    (tmp_path / "last.pt").touch()
    command = [sys.executable, "train.py", *tiny(), "--out", tmp_path]
    how = dict(cwd=HERE, stderr=subprocess.PIPE, text=True)
    both = []
    for environment in environments_of_two():
        # Not a fork, of which multiprocessing leaves out the end of the interpreter.
        both.append(subprocess.Popen(command, env={**os.environ, **environment}, **how))
    for process in both:
        error = process.communicate(timeout=600)[1]
        # One line, and nothing else that Python or a thread says of a bad end.
        assert process.returncode == 2 and error.count("\n") == 1, error
        assert "holds a run (last.pt)" in error


def train_small(environment, flags, number=0, steps=0, moment=0.0):
    """train.py on a small network. It gets the signal of that number, 0 for none, after so many
    steps, at least one, and a part (moment) of the time that the last one took."""
    os.environ.update(environment)
    learning_rate, started = train.learning_rate, []

    def signalling(*arguments):
        # This function is called at the beginning of every step.
        started.append(time.perf_counter())
        if number and len(started) == steps + 1:
            # The first step may be much slower than the next.
            wait = moment * min(started[-1] - started[-2], 0.02)
            threading.Timer(wait, os.kill, (os.getpid(), number)).start()
        return learning_rate(*arguments)

    train.learning_rate, models.build = signalling, small
    train.run(lambda: train.main([str(flag) for flag in flags]), "train.py")


def test_two_processes_stopped_and_resumed_equal_two_unbroken(tiny, tmp_path):
    # They ask each other at every tenth of 16 steps, and then save as well.
    flags = "--epochs 2 --batch-size 4 --accumulate 2 --save-every 1e-9 --resume auto --out"
    flags = [*tiny(), *flags.split()]

    def train_two(first_out, second_out, *stop, code=0):
        first, second = environments_of_two()
        in_forks(
            (train_small, first, [*flags, tmp_path / first_out]),
            (train_small, second, [*flags, tmp_path / second_out], *stop),
            code=code,
        )

    train_two("unbroken", "unbroken")
    # The second process gets the signal in its fifth step. Both stop after the tenth.
    stop = signal.SIGTERM, 4
    train_two("shared", "shared", *stop, code=128 + signal.SIGTERM)
    stopped = train.load_checkpoint(tmp_path / "shared/last.pt")
    assert (stopped["epoch"], stopped["step"]) == (0, 10)
    # Of two machines without a shared folder the second has no checkpoint.
    shutil.copytree(tmp_path / "shared", tmp_path / "apart0")
    train_two("shared", "shared")
    train_two("apart0", "apart1")
    assert not (tmp_path / "apart1").exists()
    # Bit for bit, and loss and accuracy over both parts of the epoch.
    for name in ("shared", "apart0"):
        assert same(weights(tmp_path / "unbroken/last.pt"), weights(tmp_path / name / "last.pt"))
        assert log(tmp_path / "unbroken") == log(tmp_path / name)


@pytest.mark.parametrize("wrong", ["WORLD_SIZE=two", "WORLD_SIZE=0", "RANK=2", "RANK=",
                                   "LOCAL_RANK=", "MASTER_ADDR=", "MASTER_PORT=99999", "alone"])
def test_half_an_environment_is_told_to_start_with_torchrun(capsys, monkeypatch, wrong):
    # A job template may set WORLD_SIZE alone.
    environment = {"WORLD_SIZE": "2"}
    if wrong != "alone":
        name, value = wrong.split("=")
        environment = {**environments_of_two()[0], name: value}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    fails(capsys, train, [], "start them with torchrun")


# ---- interruptions, bad input, long runs ---------------------------------------------------------

@pytest.mark.parametrize("name, times", [("SIGKILL", 20), ("SIGTERM", 8)])
def test_killed_runs_continue_bit_for_bit(capsys, monkeypatch, tiny, tmp_path, name, times):
    # A checkpoint after every step, so that signals come while it is written, too. Mixup draws at
    # every step, and must draw the same again.
    flags = "--batch-size 16 --epochs 16 --mixup 0.5 --save-every 1e-9 --out"
    flags = [*tiny(), *flags.split()]
    resumed = [*flags, tmp_path / "parts", "--resume", "auto"]
    number, random = int(getattr(signal, name)), np.random.default_rng(0)
    # SIGKILL ends the process where it is. After SIGTERM it saves first.
    code = -number if name == "SIGKILL" else 128 + number
    for _ in range(times):
        # At a random moment after one to three steps. Counted in steps the machine's speed does not
        # matter: 64 steps, four an epoch, are more than twenty runs get to do.
        moment = int(random.integers(1, 4)), random.random()
        in_forks((train_small, {}, resumed, number, *moment), code=code)
    monkeypatch.setattr(models, "build", small)
    # The last signal did not come too late: something was left to be trained.
    assert "epoch 16," in printed(capsys, train, *resumed)
    printed(capsys, train, *flags, tmp_path / "whole")
    assert same(weights(tmp_path / "whole/last.pt"), weights(tmp_path / "parts/last.pt"))
    assert log(tmp_path / "whole") == log(tmp_path / "parts")


def stop_in_evaluation(environment, flags, number):
    """train.py, which gets the signal of that number in the second batch of an evaluation."""
    evaluate = train.evaluate

    def signalled(batches):
        for i, batch in enumerate(batches):
            # Several processes ask each other at every tenth batch. One of them has to answer.
            assert i < 10, "the evaluation went on"
            if i == 1 and environment.get("RANK") != "0":
                os.kill(os.getpid(), number)
            yield batch

    train.evaluate = lambda model, batches, amp: evaluate(model, signalled(batches), amp)
    train_small(environment, flags)


@pytest.mark.parametrize("world, name", [(1, "SIGINT"), (2, "SIGTERM")])
def test_a_signal_ends_an_evaluation(tiny, tmp_path, world, name):
    # 25 batches, after the last epoch.
    flags = [*tiny(200), *"--epochs 1 --resume auto --out".split()]
    number = int(getattr(signal, name))

    def train_all(out, function=train_small, *more, code=0):
        environments = environments_of_two() if world == 2 else [{}]
        calls = ((function, environment, [*flags, out], *more) for environment in environments)
        in_forks(*calls, code=code)

    train_all(tmp_path / "whole")
    # The second time only the evaluation is left.
    for _ in range(2):
        train_all(tmp_path / "parts", stop_in_evaluation, number, code=128 + number)
    assert not (tmp_path / "parts/best.pt").exists()
    train_all(tmp_path / "parts")
    assert same(weights(tmp_path / "whole/best.pt"), weights(tmp_path / "parts/best.pt"))
    assert log(tmp_path / "whole") == log(tmp_path / "parts")


def test_main_runs_in_a_thread_and_gives_ctrl_c_back(capsys, monkeypatch, tiny, tmp_path):
    monkeypatch.setattr(models, "build", small)
    flags = [*tiny(), "--epochs", "1", "--out"]
    thread = threading.Thread(target=train.main, args=([*flags, str(tmp_path / "thread")],))
    thread.start()
    thread.join()
    learning_rate = train.learning_rate

    def interrupted(step, *more):
        if step == 2:
            signal.raise_signal(signal.SIGINT)
        return learning_rate(step, *more)

    # Ctrl-C in the third step, as in a notebook. The step is finished and saved.
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(train, "learning_rate", interrupted)
        train.main([*flags, str(tmp_path / "here")])
    assert end.value.code == 128 + signal.SIGINT
    assert train.load_checkpoint(tmp_path / "here/last.pt")["step"] == 3
    # The next one is for whoever called main.
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    # To its end it returns, for the caller to go on.
    train.main(["--resume", str(tmp_path / "here")])
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert same(weights(tmp_path / "thread/last.pt"), weights(tmp_path / "here/last.pt"))


def test_a_run_goes_on_without_the_reader_of_its_output(tiny, tmp_path):
    flags = [*tiny(), "--limit", "16", "--epochs", "2", "--out", tmp_path / "run"]
    command = [sys.executable, "train.py", *flags]
    how = dict(cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, **how)
    assert process.stdout.readline().startswith("resnet19")
    process.stdout.close()
    assert process.wait(600) == 0 and not process.stderr.read()
    assert [row[0] for row in log(tmp_path / "run")] == ["epoch", "1", "2"]


@pytest.mark.parametrize("optimizer", ["nesterov", "adamw"])
def test_a_run_of_a_gpu_continues_whatever_its_memory_format(
        capsys, monkeypatch, tiny, tmp_path, optimizer):
    monkeypatch.setattr(models, "build", small)
    flags = [*tiny(), "--optimizer", optimizer, "--lr", 0.01, "--epochs", 1]
    printed(capsys, train, *flags, "--out", tmp_path / "cpu")
    shutil.copytree(tmp_path / "cpu", tmp_path / "gpu")
    # On a GPU weights, and with them what the optimizer keeps of them, are channels_last.
    saved = torch.load(tmp_path / "cpu/last.pt", weights_only=True)
    for state in saved["optimizer"]["state"].values():
        for key, value in state.items():
            if value is not None and value.dim() == 4:
                state[key] = value.contiguous(memory_format=torch.channels_last)
    torch.save(saved, tmp_path / "gpu/last.pt")
    for name in ("cpu", "gpu"):
        printed(capsys, train, "--resume", tmp_path / name, "--epochs", 2)
    assert same(weights(tmp_path / "cpu/last.pt"), weights(tmp_path / "gpu/last.pt"))


def test_a_resumed_run_takes_new_recipe_flags_and_leaves_old_rows(
        capsys, monkeypatch, tiny, tmp_path):
    monkeypatch.setattr(models, "build", small)
    out = tmp_path / "run"
    printed(capsys, train, *tiny(), "--epochs", 1, "--out", out)
    _, before = (out / "log.csv").read_text().splitlines()
    flags = "--epochs 2 --lr 0.01 --neuron-rate 0.5 --weight-decay 0.01"
    # The checkpoint names the run as well as its folder does.
    said = printed(capsys, train, "--resume", out / "last.pt", *flags.split())
    assert "recipe fast: epochs 2, batch_size 8, optimizer nesterov, lr 0.01" in said
    _, first, second = (out / "log.csv").read_text().splitlines()
    # The finished epoch is evaluated again, not trained: only the seconds may differ.
    assert first.split(",")[:-1] == before.split(",")[:-1]
    # The cosine from 0.01 over 16 steps, the first 0.8 of which warm up.
    expected = 0.01 * 0.5 * (1 + np.cos(np.pi * (15 - 0.8) / (16 - 0.8)))
    assert float(second.split(",")[1]) == pytest.approx(expected, rel=1e-4)
    # Weights, biases and BatchNorm, neurons: the optimizer goes on with the new values.
    groups = torch.load(out / "last.pt", weights_only=True)["optimizer"]["param_groups"]
    found = [(group["lr_scale"], group["weight_decay"]) for group in groups]
    assert found == [(1.0, 0.01), (1.0, 0.0), (0.5, 0.0)]


def test_an_epoch_is_saved_before_its_evaluation(capsys, monkeypatch, tmp_path):
    tree = image_tree(tmp_path / "tree", n=1, modes=("RGB", "L"))
    flags = "--dataset folder --image-size 112 --width 4 --timesteps 1 --batch-size 2 --epochs 1"
    flags = [*flags.split(), "--no-compile", "--workers", 0, "--data-dir", tree, "--out"]
    printed(capsys, train, *flags, tmp_path / "whole")
    spoilt = tree / "val/dogs/0.png"
    good = spoilt.read_bytes()
    spoilt.write_text("no image")
    fails(capsys, train, [*flags, tmp_path / "run"], "0.png: not a readable image")
    # All of the epoch is trained and saved, and nothing is claimed about its accuracy.
    assert same(weights(tmp_path / "whole/last.pt"), weights(tmp_path / "run/last.pt"))
    assert not (tmp_path / "run/best.pt").exists()
    # With the image mended the epoch is evaluated without another step, which would fail here.
    spoilt.write_bytes(good)
    monkeypatch.setattr(train, "train_step", None)
    printed(capsys, train, "--resume", tmp_path / "run")
    assert log(tmp_path / "run") == log(tmp_path / "whole")
    assert same(weights(tmp_path / "whole/best.pt"), weights(tmp_path / "run/best.pt"))


class Bomb:
    """Would create a file named must-not-run if it were unpickled."""

    def __reduce__(self):
        return os.system, ("touch must-not-run",)


def array(*shape, value=0, kind=np.uint8):
    return lambda file: np.save(file, np.full(shape, value, kind))


def entries(**new):
    return lambda file: torch.save({**torch.load(file, weights_only=True), **new}, file)


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)


def make_a_weight_infinite(file):
    model = weights(file)
    model["blocks.3.conv2.0.weight"][0, 0, 0, 0] = float("inf")
    entries(model=model)(file)


# What is done to a file or folder in the table below.
SPOIL = {
    "cut off": lambda file: os.truncate(file, file.stat().st_size // 2),
    "text": lambda file: file.write_text("something else"),
    "removed": lambda file: shutil.rmtree(file) if file.is_dir() else file.unlink(),
    "renamed": lambda file: file.rename(file.parent / "hens"),
    "16 bits": lambda file: Image.new("I;16", (20, 20)).save(file),
    "planes first": array(64, 3, 32, 32),
    "class 10": array(64, value=10),
    "objects": array(64, value=Bomb(), kind=object),
    "other format": entries(format="other"),
    "code": entries(format=Bomb()),
    "a bit flipped": flip_a_bit,
    "infinite": make_a_weight_infinite,
    # No file may grow beyond 50 kB, less than a checkpoint.
    "disk full": lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, -1)),
}
# How a command in the table begins: a run on arrays, one on images, one that goes on, just flags.
NEW = "--dataset cifar10 --data-dir {d}/data --recipe fast --width 4 --timesteps 2 --no-compile "
NEW += "--batch-size 8 --epochs 1 --workers 1 --out new"
TREE = NEW + " --dataset folder --data-dir {d}/tree --batch-size 2"
COMMANDS = {"new": NEW, "tree": TREE, "resume": "--resume {d}/run", "flags": ""}
# The command | file or folder: what is done to it | what the line of the error says. Several
# commands of one beginning are separated by commas.
BAD_INPUT = """
# Values out of range, and a device that is not there.
new --timesteps 0, --epochs 0 || is not at least 1 and below inf
new --lr nan                  || nan is not above 0
new --device gpu              || --device gpu cannot be used here
# Flags that do not go together.
flags --resume auto             || --resume auto needs --out DIR
resume --out there              || leave --out out
# Flags that do not fit the data or the network.
new --batch-size 65             || at most the 64 training images
new --accumulate 3              || must be divisible by 1 processes x --accumulate 3
new --limit 65                  || --limit 65 is more than the 64 train images
new --arch spikformer --width 6 || multiple of 4
# Folders that cannot be written, and one that holds a run.
new --out /proc/run             || cannot write a run into /proc/run
new --out {d}/run               | run/last.pt: removed | holds a run (best.pt, log.csv)
# Data that are missing or something else.
new --dataset nmnist            || nmnist has no recordings of class 0
new | data/cifar10/train_images.npy: planes first | must be uint8 [N, 32, 32, 3]
new | data/cifar10/train_labels.npy: class 10     | whole numbers from 0 to 9
new | data/cifar10/train_labels.npy: objects      | no readable .npy
tree                  | tree/val/dogs: renamed     | ['dogs', 'hens']
tree                  | tree/val: removed          | no folder test or val
tree                  | tree/val/dogs/0.png: 16 bits | more than 8 bits
# Images of this size are read during the training, by another process.
tree --image-size 112 | tree/train/cats/0.png: text | 0.png: not a readable image
# Checkpoints that are missing, cut off, of something else, or would run code.
flags --resume nowhere          || last.pt cannot be read
flags --resume {d}/run/best.pt  || best.pt is a best.pt or folded: for evaluation only
resume | run/last.pt: cut off       | it may be truncated, or no checkpoint of train.py
resume | run/last.pt: other format  | is no checkpoint of train.py
resume | run/last.pt: code          | last.pt cannot be read
resume | run/last.pt: a bit flipped | its checksums do not fit
# A run goes on where it is, with its network and data.
resume --epochs 1         || is in epoch 2 already
resume --arch resnet18    || has --arch resnet19, not resnet18
resume --batch-size 16    || has --batch-size 8, not 16
resume --fixed-neuron     || has --fixed-neuron False, not True
resume --dataset shapes   || has --dataset cifar10, not shapes
# Runs that fail on the way.
new --lr 1e30 --warmup 0  || NaN or infinite by step 8 of epoch 1
resume --epochs 3 | run/last.pt: infinite | logits are NaN or infinite
resume --epochs 3 | run: disk full        | cannot write
"""
ROWS = [row for row in BAD_INPUT.splitlines() if "|" in row]


@pytest.mark.parametrize("row", ROWS)
def test_bad_input_is_one_line(capsys, monkeypatch, run_and_data, tmp_path, row):
    command, spoilt, expected = (column.strip() for column in row.split("|"))
    monkeypatch.chdir(tmp_path)
    d = shutil.copytree(run_and_data, tmp_path / "d")
    if spoilt:
        file, how = spoilt.split(": ")
        SPOIL[how](d / file)
    # The log alone is written anew where a run goes on.
    files = [file for file in d.rglob("*.*") if file.is_file() and file.name != "log.csv"]
    before = [file.read_bytes() for file in files]
    beginning, _, endings = command.partition(" ")
    for ending in endings.split(", "):
        flags = f"{COMMANDS[beginning]} {ending}".format(d=d)
        fails(capsys, train, flags.split(), expected)
    # What was there is unchanged, no half of a file is left, and no code was run.
    assert [file.read_bytes() for file in files] == before
    assert not list(tmp_path.rglob(".*")) and not os.path.exists("must-not-run")


def test_memory_does_not_grow(fused):
    model = small("", 10, timesteps=2, in_channels=3, width=4)
    optimizer, used = torch.optim.SGD(model.parameters(), 0.01), []
    # A step that kept its current of 0.5 MB would take 30 MB in the last sixty.
    x, y = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(model(x).mean(0), y).backward()
        optimizer.step()
        # The second number is the program's pages in memory, of 4 KiB.
        used.append(int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096)
    # The first steps may fill caches.
    assert np.mean(used[-20:]) - np.mean(used[20:40]) < 8 * 2**20
