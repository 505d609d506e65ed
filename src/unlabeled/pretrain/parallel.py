"""Ranks, devices and precision: one process, or many under torchrun, with the same code."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unlabeled.devices import choose_device, has_bf16


@dataclass
class Parallel:
    """This process among the ranks.

    Attributes:
        device: where this rank computes.
        rank: 0 for the one that writes files.
        world: number of ranks.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rank: int = 0
    world: int = 1

    @staticmethod
    def start(device: str = "auto") -> Parallel:
        """Join the ranks that torchrun started, if it did (environment variables RANK, WORLD_SIZE)."""
        chosen = choose_device(device)
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
            return Parallel(chosen)
        if not dist.is_initialized():
            store, rank, world = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
            if os.environ.get("GROUP_WORLD_SIZE") == "1":
                # torchrun's store outlives ranks that it starts again, who would find each other's old addresses.
                store = dist.PrefixStore(f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)  # type: ignore[attr-defined]
            # What hosts say to each other, they say by gloo: no device is waited for.
            backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=world)
        return Parallel(chosen, dist.get_rank(), dist.get_world_size())

    @property
    def distributed(self) -> bool:
        """Whether a process group exists, of one rank even."""
        return dist.is_initialized()

    def stop(self) -> None:
        """Leave the ranks."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def wrap(
        self, student: nn.Module, teacher: nn.Module, sharding: str, reduce: str = "float32"
    ) -> tuple[nn.Module, nn.Module]:
        """Student and teacher as the ranks share them.

        Args:
            student: gets gradients.
            teacher: gets none.
            sharding: "ddp" copies, "fsdp" shards (FSDP2).
            reduce: what "fsdp" sums the gradients of the blocks in; those of the rest are summed in float32.
        """
        if not self.distributed:
            return student, teacher
        if sharding == "fsdp":
            from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

            policy = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16 if reduce == "bf16" else None)
            for network in (student, teacher):
                blocks = cast(Any, network).backbone.blocks
                for block in blocks:
                    fully_shard(block, mp_policy=policy)
                for block, after in pairwise(blocks):  # asked for while this one computes
                    block.set_modules_to_forward_prefetch([after])
            fully_shard(student)
            # No backward pass of the teacher's would shard its root again before the EMA.
            fully_shard(teacher, reshard_after_forward=True)
            return student, teacher
        for value in student.state_dict().values():  # one start for all ranks
            dist.broadcast(value, 0)
        teacher.load_state_dict(student.state_dict())
        ids = [self.device.index] if self.device.type == "cuda" else None
        with warnings.catch_warnings():
            # The argument's name changed in a torch that is newer than the oldest one that will do.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            wrapped = nn.parallel.DistributedDataParallel(student, device_ids=ids, broadcast_buffers=False)
        return wrapped, teacher

    @staticmethod
    def unwrap(network: nn.Module) -> nn.Module:
        """The network itself, without DDP around it."""
        return network.module if isinstance(network, nn.parallel.DistributedDataParallel) else network

    @contextlib.contextmanager
    def no_sync(self, network: nn.Module) -> Iterator[None]:
        """Gradients of this pass stay on the rank until a later pass shares the sum.

        Shards are summed up after every pass: a gradient that waits would be a whole one, on each rank.
        """
        with (
            network.no_sync()
            if isinstance(network, nn.parallel.DistributedDataParallel)
            else contextlib.nullcontext()
        ):
            yield

    def autocast(self, precision: str) -> torch.autocast:
        """Compute in bf16 where asked for, or with "auto" where the device has it; state stays float32."""
        enabled = precision == "bf16" or (precision == "auto" and has_bf16(self.device))
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def mean(self, scalars: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each scalar averaged over the ranks, in one message."""
        values = torch.stack([value.detach().float().reshape(()) for value in scalars.values()])
        if self.distributed:
            dist.all_reduce(values)
            values /= self.world
        return dict(zip(scalars, values.unbind(), strict=True))

    def any(self, flag: bool) -> bool:
        """Whether any rank says so; asked and answered by the hosts, whatever their devices are at."""
        if not self.distributed:
            return flag
        value = torch.tensor(float(flag))
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return bool(value.item())

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.distributed:
            dist.barrier()

    def gather(self, values: Tensor) -> Tensor:
        """Rows of all ranks, concatenated; the ranks hold the same number of rows."""
        if not self.distributed:
            return values
        parts = [torch.empty_like(values) for _ in range(self.world)]
        dist.all_gather(parts, values.contiguous())
        return torch.cat(parts)
