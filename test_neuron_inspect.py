"""Tests of what looks inside a network: counting, folding, histograms, reports. To become a section of test_neuron.py."""
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn as nn

import data
import eval as evaluation
import models
import neuron
from neuron import TrLIF


# ---- looking inside

@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    monkeypatch.setattr(neuron, "COMPILE", False)                        # compiling would take longer than all of this


FOLDED = [("resnet19", 8, 32), ("resnet18", 8, 64), ("sew_resnet18", 8, 64), ("spikformer", 8, 32)]


def randomised(arch, width, timesteps=2, in_channels=3, num_classes=10, size=32, seed=0):
    """A network in float64 with every threshold, leak, start, scale, shift and running mean different, that fires in every layer."""
    torch.manual_seed(seed)
    model = models.build(arch, num_classes, timesteps, in_channels, width).double()
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


@pytest.mark.parametrize("arch, width, size", FOLDED)
def test_folding_changes_nothing(arch, width, size):
    model = randomised(arch, width)
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
    assert all((layer.surrogate == "trsg") for layer in evaluation.neurons_of(model).values())           # the original is untouched


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
    assert model.timesteps == 3 and not any(layer._forward_pre_hooks for name, layer in model.named_modules() if name != "lif")


def test_event_sequences_are_repeated():
    model = randomised("resnet19", 4, in_channels=2).float()
    x = torch.randint(0, 3, (4, 2, 2, 32, 32)).float()
    result, laws = evaluation.potentials(model, batches_of(x), 2, 10)
    assert len(result["top1_at"]) == 10
    alone = evaluation.evaluate(model, batches_of(x))
    assert result["top1_at"][:2] == alone["top1_at"] and laws["lif"].shape == (3, evaluation.BINS)


def printed(capsys, *args):
    """What eval.py prints when called with args in this process."""
    evaluation.main([str(arg) for arg in args])
    return capsys.readouterr().out


@pytest.mark.parametrize("arch", ["resnet19", "spikformer"])
def test_saved_folded_network_predicts_the_same(tmp_path, capsys, arch):
    path = checkpoint_file(tmp_path / "a.pt", arch)
    out = printed(capsys, path, "--save-folded", tmp_path / "f.pt", "--images", 64)
    assert "same prediction on 100.00 % of 64 images" in out
    original, folded = (evaluation.build_network(evaluation.load_checkpoint(tmp_path / name)) for name in ("a.pt", "f.pt"))
    x = torch.randn(32, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(models.fold(original)(x), folded(x))
    with pytest.raises(data.UserError, match="folded already"):
        evaluation.main([str(tmp_path / "f.pt"), "--fold", "--images", "64"])
    if arch == "resnet19":                                               # and in a process that knows nothing but the file
        again = subprocess.run([sys.executable, evaluation.__file__, "f.pt", "--images", "64", "--batch-size", "16", "--device", "cpu"],
                               capture_output=True, text=True, cwd=tmp_path)
        read_out = [[line for line in text.splitlines() if line.startswith("read out")] for text in (out, again.stdout)]
        assert again.returncode == 0 and read_out[0] == read_out[1] and "folded" in again.stdout, again.stderr


def test_report_comparison_and_plot(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    a, b = checkpoint_file(tmp_path / "a.pt"), checkpoint_file(tmp_path / "b.pt", "sew_resnet18")
    out = printed(capsys, a, b, "--images", 20, "--batch-size", 16, "--report", tmp_path / "r.md", "--plot", tmp_path / "p.png")
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
                                        (["nowhere.pt"], "no such file"), (["nowhere.pt", "--images", "0"], "at least 1")])
def test_mistakes_are_one_line(capsys, args, says):
    with pytest.raises(SystemExit) as left:
        evaluation.run(lambda: evaluation.main(args), "eval.py")
    err = capsys.readouterr().err
    assert left.value.code == 2 and len(err.splitlines()) == 1 and says in err
