"""Steps and rates as messages between the ranks of a group, and back."""

from __future__ import annotations

from dataclasses import replace

from scheduler.request import SamplingParams
from scheduler.step_plan import ScheduledChunk, StepPlan
from scheduler.types import DeviceProfile, GemmRate
from workers.parallel import group_pb2 as pb

_IS_SAMPLED = SamplingParams(max_tokens=1)  # a follower computes logits; which token they give is the leader's business


def step_to_wire(plan: StepPlan) -> pb.Command:
    return pb.Command(
        step=pb.Step(
            chunks=[
                pb.Chunk(
                    token_ids=chunk.token_ids,
                    start=chunk.start,
                    block_table=chunk.block_table,
                    num_logits=chunk.num_logits,
                )
                for chunk in plan.chunks
            ]
        )
    )


def step_from_wire(step: pb.Step) -> StepPlan:
    """The same step under other names: a follower need not know whose sequences these are."""
    return StepPlan(
        tuple(
            ScheduledChunk(
                str(index),
                tuple(chunk.token_ids),
                chunk.start,
                0,
                tuple(chunk.block_table),
                _IS_SAMPLED if chunk.num_logits else None,
                prompt_targets=(0,) * (chunk.num_logits - 1),  # which tokens they are for is the leader's business
            )
            for index, chunk in enumerate(step.chunks)
        )
    )


def profile_to_wire(device: DeviceProfile) -> pb.Rates:
    return pb.Rates(
        gemm_gflop_s=device.gemm_gflop_s,
        read_gb_s=device.read_gb_s,
        gemm_rates=[pb.GemmRate(rows=rate.rows, gflop_s=rate.gflop_s) for rate in device.gemm_rates],
        attention_gb_s=device.attention_gb_s,
    )


def profile_from_wire(own: DeviceProfile, rates: pb.Rates) -> DeviceProfile:
    """Another rank's rates; all else is as in the leader's ``own`` profile."""
    return replace(
        own,
        gemm_gflop_s=rates.gemm_gflop_s,
        read_gb_s=rates.read_gb_s,
        gemm_rates=tuple(GemmRate(rate.rows, rate.gflop_s) for rate in rates.gemm_rates),
        attention_gb_s=rates.attention_gb_s,
    )
