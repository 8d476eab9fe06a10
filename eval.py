"""Evaluate checkpoints: python eval.py runs/NAME/best.pt

The network is rebuilt from the checkpoint alone. Printed are top-1 and top-5 accuracy on the test set, and the accuracy
when the network is read out after t = 1 ... T time steps.
"""
import argparse
import pickle
import sys
import time

import torch
import torch.distributed as dist

import data
import models
from data import UserError, first_line

FORMAT = "MP-Init + TrSG checkpoint 1"


def load_checkpoint(path):
    """A checkpoint as train.py wrote it, on the CPU: plain data and tensors, nothing that could run code."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:                      # weights_only refused it
        raise UserError(f"{path} is no checkpoint of train.py, or holds objects other than plain data") from error
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, IndexError, TypeError) as error:
        raise UserError(f"{path} cannot be read as a checkpoint, it may be truncated: {first_line(error)}") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise UserError(f"{path} is no checkpoint of train.py ('format' is not {FORMAT!r})")
    return checkpoint


def build_network(checkpoint, path="checkpoint"):
    """The network in a checkpoint, in evaluation mode."""
    try:
        model = models.build(**checkpoint["network"])
        model.load_state_dict(checkpoint["model"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f"{path}: weights and description of the network do not fit: {first_line(error)}") from error
    return model.eval()


@torch.no_grad()
def evaluate(model, batches, amp=False):
    """Accuracy on (x, y) batches; y = -1 is padding. Under torch.distributed, over what all processes see together.

    Returns a dict: top1_at, a list of the fraction right when read out after t = 1 ... T steps (mean logits so far);
    top1 = top1_at[-1]; top5; images. Waits for the device once, at the end.
    """
    training, totals = model.training, 0
    model.eval()
    for x, y in batches:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
            logits = model(x)                                    # [T, B, classes]
        so_far = logits.float().cumsum(0)                        # the mean's argmax is the sum's
        right = (so_far.argmax(2) == y).sum(1)                   # [T]
        among5 = (so_far[-1].topk(min(5, logits.shape[2])).indices == y[:, None]).sum()
        totals = totals + torch.cat([right, among5[None], (y >= 0).sum()[None]])
    model.train(training)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(totals)
    *right, among5, images = totals.tolist()
    top1_at = [r / images for r in right]
    return {"top1_at": top1_at, "top1": top1_at[-1], "top5": among5 / images, "images": images}


def test_data(checkpoint, data_dir, workers, timesteps=None):
    """The checkpoint's test set, normalised as in its training; recordings of events in frames and split as there."""
    described = checkpoint["data"]
    dataset = data.load(described["name"], data_dir, described["image_size"], workers, timesteps or checkpoint["network"]["timesteps"],
                        described.get("dvs_split"), described.get("bin_by"))
    if len(dataset.classes) != checkpoint["network"]["num_classes"]:
        raise UserError(f"{described['name']} in {data_dir} has {len(dataset.classes)} classes, the checkpoint's network "
                        f"{checkpoint['network']['num_classes']}")
    dataset.mean, dataset.std = described["mean"], described["std"]
    return dataset


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="last.pt or best.pt of a run")
    parser.add_argument("--data-dir", default="data", help="where the data sets are (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=256, help="images at a time (default: %(default)s)")
    parser.add_argument("--timesteps", type=int, help="time steps to run for, if other than in training")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode large images (default: %(default)s)")
    args = parser.parse_args(argv)
    for name in ("batch_size", "timesteps"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return args


def main(argv=None):
    args = arguments(argv)
    checkpoint = load_checkpoint(args.checkpoint)
    model = build_network(checkpoint, args.checkpoint).to(args.device, memory_format=data.memory_format(args.device))
    network = checkpoint["network"]
    model.timesteps = args.timesteps or network["timesteps"]
    dataset = test_data(checkpoint, args.data_dir, args.workers, args.timesteps).to(args.device)
    print(f"{args.checkpoint}: {network['arch']}, width {network['width']}, T = {model.timesteps}, "
          f"{checkpoint['data']['name']}{f', split {dataset.split}' if dataset.split else ''}, epoch {checkpoint['epoch']}")
    start = time.perf_counter()
    result = evaluate(model, dataset.test(args.batch_size))
    seconds = time.perf_counter() - start
    print(f"top-1 {100 * result['top1']:.2f} %   top-5 {100 * result['top5']:.2f} %   of {result['images']} images, "
          f"{result['images'] / seconds:.0f} images/s")
    print("read out after  " + "  ".join(f"t={t}: {100 * a:.2f} %" for t, a in enumerate(result["top1_at"], 1)))


def run(main, program):
    """Call main(); an expected failure becomes one line on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    run(main, "eval.py")
