"""Steps as messages between the ranks of a group, and back."""

from __future__ import annotations

from scheduler.batching import ScheduledChunk, StepPlan
from scheduler.request import SamplingParams
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
