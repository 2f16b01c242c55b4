"""Loaded by Ray's autoscaler in its own process: its provider of fake nodes, for node types that say their memory."""

from __future__ import annotations

from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class NodesWithMemory(FakeMultiNodeProvider):  # type: ignore[misc]  # Ray has no types here
    def _create_node_with_resources_and_labels(
        self,
        node_config: dict[str, Any],
        tags: dict[str, str],
        count: int,
        resources: dict[str, float],
        labels: dict[str, str],
    ) -> None:
        """A node finds its memory, the machine's, by itself; Ray refuses to be told here."""
        others = {name: amount for name, amount in resources.items() if name != "memory"}
        super()._create_node_with_resources_and_labels(node_config, tags, count, others, labels)
