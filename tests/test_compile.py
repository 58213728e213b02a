"""What runs on a GPU, tried on a CPU: compiled blocks under DDP, memory.

backend="aot_eager" traces and differentiates as torch.compile's own backend does, and generates no
code: a graph break or a recompilation shows in seconds.
"""

import dataclasses
import functools

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

import train
from model import SIZES, Config, TransDiff

shape = dict(width=64, heads=2, ar_depth=2, dit_depth=2, num_classes=5, cond_tokens=16)
latents = dict(class_tokens=4, latent_channels=4, latent_size=8)
SMALL = Config(**shape, **latents, dropout=0.0, label_drop_prob=0.5)


@pytest.fixture
def backend(caplog):
    """aot_eager; backend.frame_count is the number of graphs that it has compiled."""
    caplog.set_level("WARNING", "torch.__trace")  # else a failure prints thousands of lines
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(optimize_ddp=True):  # restores what parallelize changes
        yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def build(refs):
    torch.manual_seed(0)
    model = TransDiff(dataclasses.replace(SMALL, refs=refs))
    with torch.no_grad():
        model.decoder.output_proj.weight.normal_(std=0.1)  # zero would hide what comes before
    return model


def close(ours, theirs):
    """Within 1 %."""
    return (ours - theirs).norm() <= 0.01 * theirs.norm()


def loss_and_gradients(model, forward, refs):
    """Of one step as the loop of train.py takes it: two micro-batches, bf16 autocast."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(8, refs, *SMALL.latent_shape, generator=generator)
    labels = torch.arange(8) % 5
    total = 0.0
    torch.manual_seed(2)  # dropped labels, t, noise
    for i, (x, y) in enumerate(zip(latents.chunk(2), labels.chunk(2))):
        forward.require_backward_grad_sync = i == 1
        with torch.autocast("cpu", torch.bfloat16):
            loss = forward(x, y, batch_mul=2)
        (loss / 2).backward()
        total += loss.detach() / 2
    return total, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("refs", [1, 4])
def test_blocks_compile_under_ddp_once_per_kind(refs, backend, process_group, monkeypatch):
    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: original(self, backend=backend))
    monkeypatch.setattr(train, "WORLD", 2)  # wrap in DDP; the group has one process
    # A block is larger than DDP's buckets, as with 25 MB at size B.
    ddp = functools.partial(DistributedDataParallel, bucket_cap_mb=0.05)
    monkeypatch.setattr(train, "DistributedDataParallel", ddp)
    model = build(refs)
    forward = train.parallelize(model, use_compile=True)
    assert isinstance(forward, DistributedDataParallel)
    loss, grads = loss_and_gradients(model, forward, refs)
    assert backend.frame_count == 2  # one for all blocks of the AR Transformer, one for the DiT's
    assert not counters["graph_break"]
    eager = build(refs)
    eager_loss, eager_grads = loss_and_gradients(eager, eager, refs)
    assert close(loss, eager_loss)
    assert all(grad.any() for grad in eager_grads.values())  # zeros would be equal anyway
    for name, grad in eager_grads.items():
        assert close(grads[name], grad), name


# -------------------------------------------------------------------------------- memory
@pytest.mark.parametrize("size,refs,gigabytes", [  # the table of tests/README.md
    ("B", 1, 0.99), ("B", 4, 1.68), ("L", 1, 1.75), ("L", 4, 2.97), ("H", 1, 2.73), ("H", 4, 4.63),
])  # fmt: skip
def test_memory_of_a_chain_is_that_of_the_table(size, refs, gigabytes):
    config = dataclasses.replace(SIZES[size], refs=refs)
    ours = train.memory_per_chain(config, batch_mul=4 if refs == 1 else 2)
    assert ours / 1e9 == pytest.approx(gigabytes, rel=0.02)


def test_a_frozen_ar_transformer_keeps_no_activations():
    config = dataclasses.replace(SIZES["L"], latent_size=32)
    ours = train.memory_per_chain(config, batch_mul=4)
    frozen = train.memory_per_chain(config, batch_mul=4, only_decoder=True)
    deeper = dataclasses.replace(config, ar_depth=64)
    assert frozen < ours < train.memory_per_chain(deeper, batch_mul=4)
    assert frozen == train.memory_per_chain(deeper, batch_mul=4, only_decoder=True)


@pytest.mark.parametrize("size,refs,latent_size", [
    ("B", 1, 16), ("B", 4, 16), ("B", 16, 16), ("B", 64, 16), ("L", 1, 32), ("H", 4, 16),
])  # fmt: skip
def test_micro_batches_fill_half_of_what_the_weights_leave_and_no_more(size, refs, latent_size):
    config = dataclasses.replace(SIZES[size], refs=refs, latent_size=latent_size)
    num_params = {"B": 290e6, "L": 683e6, "H": 1328e6}[size]
    chain = train.memory_per_chain(config, batch_mul=4 if refs == 1 else 2)
    count = train.micro_batches_needed(256, chain, num_params, memory=80e9)
    room = (80e9 - 30 * num_params) / 2
    assert 256 % count == 0 and 256 / count * chain <= room
    assert count == 1 or 256 / (count / 2) * chain > room  # half as many would not do
