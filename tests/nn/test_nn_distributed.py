"""Layers among several processes: both kinds of FSDP, collectives, and DataParallel's replicas.

Two processes over gloo compute everything once; each test looks at a part of what they found.
"""

import copy
import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
from budget import assert_bitwise
from layers import C, layer, parametrisations
from strategies import backends, normal
from torch import nn

from ra_triton.nn import RACausalSelfAttention, from_gpt2, to_gpt2

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="processes of one CPU")
PARAMETRISATIONS = ("free", "composed")


def replica_of(module):
    """What ``torch.nn.parallel.replicate`` makes for a device: parameters are plain attributes."""
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        replica._modules[name] = None if child is None else replica_of(child)
    for name, p in module._parameters.items():
        if p is None:
            replica._parameters[name] = None
        else:
            setattr(replica, name, p.clone())
    return replica


@backends
@parametrisations
@pytest.mark.parametrize("training", [True, False])
def test_a_replica_computes_the_same_and_its_gradients_reach_the_parameters(
    backend, parametrisation, training
):
    options = {"backend": backend, "qk_norm": True, "rope": True}
    module, x = layer(parametrisation, **options).train(training), normal(2, 5, C)
    grads = []
    for made in (module, replica_of(module)):
        assert list(made.parameters()) == [] or made is module
        out = made(x)
        grads.append((out, *torch.autograd.grad(out.square().sum(), list(module.parameters()))))
    for got, want in zip(grads[1], grads[0], strict=True):
        assert_bitwise(got.detach(), want.detach())
    with torch.no_grad():
        assert_bitwise(replica_of(module)(x), module(x))


# In the processes


def outputs(module, x):
    """In training and eval(), with gradients and without."""
    found = []
    for training, grad in ((True, True), (False, True), (False, False)):
        module.train(training)
        with torch.set_grad_enabled(grad):
            found.append(module(x).detach().clone())
    return found


def fsdp1(module):
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(module, device_id=torch.device("cpu"))


def fsdp1_of_children(module):
    module.c_attn, module.c_proj = fsdp1(module.c_attn), fsdp1(module.c_proj)
    return fsdp1(module)


def fsdp2(module):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    return module


def fsdp2_of_children(module):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for part in (module.c_attn, module.c_proj, module):
        fully_shard(part, mesh=mesh)
    return module


SHARDED = (fsdp1, fsdp1_of_children, fsdp2, fsdp2_of_children)


def plain_and(shard, backend, kind):
    """The outputs of a layer, and of its copy in shards, which a step has trained."""
    module, x = layer(kind, backend=backend), normal(2, 5, C)
    sharded = shard(copy.deepcopy(module))
    for one in (module, sharded):
        one.train()
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        one(x).square().mean().backward()
        optimizer.step()
        one.zero_grad()
    return outputs(module, x), outputs(sharded, x)


def written_by_a_collective(collective, backend, kind):
    """Outputs of a layer in eval() that a collective has written, and of a new one."""
    module, x = layer(kind, dist.get_rank(), backend=backend).eval(), normal(2, 5, C)
    with torch.no_grad():
        module(x)
        for p in module.parameters():
            collective(p)
        state = {name: t.clone() for name, t in module.state_dict().items()}
        fresh = layer(kind, 5, backend=backend).eval()
        fresh.load_state_dict(state)
        return [module(x)], [fresh(x)]


COLLECTIVES = {"broadcast": partial(dist.broadcast, src=0), "all_reduce": dist.all_reduce}


def initialised_in_shards(kind, recip_per_head):
    """W_recip as a layer has it that was made on meta, sharded and then initialised."""
    options = {"parametrisation": kind, "recip_per_head": recip_per_head}
    with torch.device("meta"):
        module = RACausalSelfAttention(C, 3, 4, **options)
    fsdp2(module)
    module.to_empty(device="cpu")
    module.reset_parameters()
    assert module(normal(2, 5, C)).isfinite().all()
    try:
        to_gpt2(module)
        refused = ""
    except ValueError as error:
        refused = str(error)
    return [module.c_attn.W_recip.full_tensor().detach()], refused


def work(rank, folder):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/met", rank=rank, world_size=2)
    found = {}
    for kind in PARAMETRISATIONS:
        for shard in SHARDED:
            found[shard.__name__, kind] = plain_and(shard, "sdpa", kind)
        for name, collective in COLLECTIVES.items():
            found[name, kind] = written_by_a_collective(collective, "sdpa", kind)
    found["fsdp1", "composed", "triton"] = plain_and(fsdp1, "triton", "composed")
    for recip_per_head in (True, False):
        found["initialised", recip_per_head] = initialised_in_shards("composed", recip_per_head)
    torch.save(found, f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / str(rank)) for rank in range(2)]


@pytest.mark.slow
@on_cpu
def test_shards_and_collectives_leave_no_layer_behind(found):
    for rank in found:
        assert len(rank) == 2 * (4 + 2) + 1 + 2
        for name, (got, want) in rank.items():
            if name[0] != "initialised":
                for a, b in zip(got, want, strict=True):
                    assert_bitwise(a, b, str(name))


@pytest.mark.slow
@on_cpu
def test_a_layer_made_on_meta_is_initialised_in_shards(found):
    for recip_per_head in (True, False):
        module = RACausalSelfAttention(
            C, 3, 4, parametrisation="composed", recip_per_head=recip_per_head
        )
        for rank in found:
            (W_recip,), refused = rank["initialised", recip_per_head]
            assert_bitwise(W_recip, module.c_attn.W_recip.detach())
            assert "is sharded, a DTensor: gather a full state dict" in refused


@parametrisations
@pytest.mark.parametrize("options", [{}, {"R": 0, "n_kv_head": 1}, {"rope": True, "qk_norm": True}])
def test_a_layer_made_on_meta_is_initialised_where_it_is_moved(parametrisation, options):
    made = {"parametrisation": parametrisation, "backend": "sdpa", "R": 4, **options}
    module = RACausalSelfAttention(C, 3, device="meta", **made)
    assert all(p.is_meta for p in module.parameters())
    module.to_empty(device="cpu")
    torch.manual_seed(3)
    module.reset_parameters()
    torch.manual_seed(3)
    other = RACausalSelfAttention(C, 3, **made)
    torch.manual_seed(3)
    other.reset_parameters()
    x = normal(2, 5, C).cpu()
    assert_bitwise(module(x), other(x))


# Wrapped models exchange weights under the names of what they wrap


def compiled(module):
    return torch.compile(module, backend="eager")


def compiled_child(module):
    return nn.Sequential(torch.compile(module[0], backend="eager"))


def checkpointed(module):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return nn.Sequential(checkpoint_wrapper(module[0]))


WRAPPERS = {
    "compile": compiled,
    "compiled child": compiled_child,
    "DataParallel": nn.DataParallel,
    "compiled DataParallel": lambda m: compiled(nn.DataParallel(m)),
    "DataParallel of compiled": lambda m: nn.DataParallel(compiled(m)),
    "checkpoint": checkpointed,
}


@parametrisations
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_model_has_the_names_of_its_own(parametrisation, wrapper):
    source, other = (nn.Sequential(layer(parametrisation, seed)) for seed in (0, 1))
    wrapped, state = WRAPPERS[wrapper](other), to_gpt2(source)
    assert from_gpt2(wrapped, state) is wrapped
    x = normal(2, 5, C)
    assert_bitwise(other(x), source(x))
    folded = to_gpt2(wrapped)
    assert folded.keys() == state.keys()
    for name, t in folded.items():
        assert_bitwise(t, state[name], name)


@parametrisations
@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."]
)
def test_the_state_of_a_wrapped_model_loads(parametrisation, prefix):
    source, other = (layer(parametrisation, seed) for seed in (0, 1))
    from_gpt2(other, {f"{prefix}{name}": t for name, t in to_gpt2(source).items()})
    x = normal(2, 5, C)
    assert_bitwise(other(x), source(x))


def test_a_child_that_is_called_module_keeps_its_name():
    source, other = (nn.ModuleDict({"module": layer(seed=seed)}) for seed in (0, 1))
    state = to_gpt2(source)
    assert all(name.startswith("module.c_") for name in state)
    from_gpt2(other, state)
    x = normal(2, 5, C)
    assert_bitwise(other["module"](x), source["module"](x))
