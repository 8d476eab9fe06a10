"""Tests, a section per component. Run: python -m pytest -q test_neuron.py

They compare with something independent: a NumPy oracle whose backward pass is derived by hand, a lemma of the paper, a
second process, an uninterrupted run.
"""
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import models
import neuron
from neuron import TrLIF

HERE = pathlib.Path(__file__).resolve().parent
SMALL = ["--dataset", "shapes", "--arch", "resnet19", "--width", "4", "--timesteps", "2", "--no-compile"]


def python(*arguments, cwd=HERE, code=0, **environment):
    """Run a Python program in a process of its own; returns its output. code: the exit status it must have."""
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=600,
                          env={**os.environ, **environment})
    assert done.returncode == code, f"exit {done.returncode}, not {code}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout if code == 0 else done.stderr


@pytest.fixture
def plain(monkeypatch):
    monkeypatch.setattr(neuron, "COMPILE", False)


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
def test_outputs_and_gradients_equal_the_oracle(plain, T, theta, tau, surrogate):
    check_against_oracle(T, theta, tau, surrogate, torch.float64, 1e-12)


@pytest.mark.parametrize("mp_init", ["all", "off"])
def test_other_initialisations_equal_the_oracle(plain, mp_init):
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
def test_scaling_current_and_threshold_leaves_trsg_gradients_as_they_were(plain, surrogate, c):
    def gradients(scale):
        torch.manual_seed(0)
        x = (scale * 2 * torch.randn(4, 50, dtype=torch.float64)).requires_grad_()
        theta = torch.tensor(1.3 * scale, dtype=torch.float64, requires_grad=True)
        v_init, k = torch.tensor(0.2 * scale, dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64)
        spikes = neuron.lif(x, v_init, theta, k, surrogate)[0]
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
def test_mp_init_halves_the_shift_between_early_and_late_steps(plain, m, s):
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


def test_v_init_is_saved_frozen_in_evaluation_and_left_alone_by_silence(plain):
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


def test_backward_keeps_the_input_only(plain):
    x, kept = torch.randn(8, 1000, requires_grad=True), []
    for run in (neuron._lif_and_statistic, torch.compile(neuron._lif_and_statistic)):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            spikes, _ = run(x, torch.zeros(()), torch.ones((), requires_grad=True), torch.full((), 0.5), "trsg", "active")
        assert sum(t.numel() for t in kept if t.data_ptr() != x.data_ptr()) < 100, [t.shape for t in kept]
        spikes.sum().backward()


def test_few_compilations_serve_a_whole_training(fused):
    torch._dynamo.reset()
    neuron._compiled.cache_clear()
    torch._dynamo.utils.counters.clear()
    model = models.build("resnet19", 10, timesteps=2, width=4)
    for batch in (8, 8, 5, 3):                                   # 17 layers of 5 shapes, batches of 3 sizes, both modes
        model.train()(torch.randn(batch, 3, 32, 32)).sum().backward()
        with torch.no_grad():
            model.eval()(torch.randn(batch, 3, 32, 32))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 6


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
    assert len(caught) == 1 and torch.equal(first, second) and torch.equal(first, neuron.lif(x, *map(torch.tensor, (0., 1., .5)))[0])


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
