"""Mutual TLS between gateway and workers: tokens and KV flow with it, and nobody else is let in."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from engine.certificates import throw_away_certificates
from kvcache.errors import ConfigError
from kvcache.transfer import kv_transfer_pb2 as kv_pb
from kvcache.transfer import kv_transfer_pb2_grpc as kv_pb_grpc
from kvcache.transfer.port_choice import PortName
from tests.cluster import LocalCluster, TinyCheckpoint, local_cluster
from workers import worker_pb2 as pb
from workers import worker_pb2_grpc as pb_grpc
from workers.tls import KEY_FILE, TLS_NAME, TlsFolder

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def certificates() -> Iterator[Path]:
    with throw_away_certificates(("cluster",)) as folder:
        yield folder


@pytest.fixture(scope="module")
def strangers() -> Iterator[Path]:
    """Of another run."""
    with throw_away_certificates(("cluster",)) as folder:
        yield folder


@pytest.mark.parametrize("port", ["auto", "grpc"])
def test_tokens_and_kv_flow_with_tls(checkpoint: TinyCheckpoint, certificates: Path, port: PortName) -> None:
    async def scenario() -> None:
        tls = TlsFolder(str(certificates / "cluster"))
        async with local_cluster(checkpoint, prefill=1, decode=1, tls=tls, kv_transfer_port=port) as cluster:
            await cluster.check_greedy(checkpoint.prompt(60), 10)
            assert cluster.load("decode-0").transfers == 1

    asyncio.run(scenario())


def credentials_of(kind: str, certificates: Path, strangers: Path) -> grpc.ChannelCredentials | None:
    own = certificates / "cluster"
    match kind:
        case "no TLS":
            return None
        case "no certificate":
            return grpc.ssl_channel_credentials((own / "ca.pem").read_bytes())
        case _:
            other = strangers / "cluster"
            return grpc.ssl_channel_credentials(
                (own / "ca.pem").read_bytes(), (other / "key.pem").read_bytes(), (other / "cert.pem").read_bytes()
            )


async def check_refused(cluster: LocalCluster, credentials: grpc.ChannelCredentials | None) -> None:
    address = cluster.workers["decode-0"].address
    options = (("grpc.ssl_target_name_override", TLS_NAME),)
    channel = (
        grpc.aio.insecure_channel(address)
        if credentials is None
        else grpc.aio.secure_channel(address, credentials, options=options)
    )
    async with channel:
        generate = pb_grpc.WorkerStub(channel).Generate(pb.GenerateRequest(request_id="a", prompt_token_ids=[1]))
        send = kv_pb_grpc.KVTransferStub(channel).Send(iter([kv_pb.TransferMessage()]))
        for call in (generate.read(), send):
            with pytest.raises(grpc.aio.AioRpcError) as refusal:
                await asyncio.wait_for(call, 10)
            assert refusal.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("kind", ["no TLS", "no certificate", "another authority's certificate"])
def test_a_client_without_a_certificate_of_the_cluster_is_refused(
    checkpoint: TinyCheckpoint, certificates: Path, strangers: Path, kind: str
) -> None:
    async def scenario() -> None:
        tls = TlsFolder(str(certificates / "cluster"))
        async with local_cluster(checkpoint, prefill=1, decode=1, tls=tls) as cluster:
            await check_refused(cluster, credentials_of(kind, certificates, strangers))
            await cluster.check_greedy(checkpoint.prompt(20), 3)

    asyncio.run(scenario())


def test_certificates_are_for_this_user_only_and_gone_in_the_end() -> None:
    with throw_away_certificates(("gateway", "worker")) as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
        keys = [folder / process / KEY_FILE for process in ("gateway", "worker")]
        assert [key.stat().st_mode & 0o777 for key in keys] == [0o600, 0o600]
        assert keys[0].read_bytes() != keys[1].read_bytes()
        authorities = {(folder / process / "ca.pem").read_bytes() for process in ("gateway", "worker")}
        assert len(authorities) == 1
    assert not folder.exists()


def test_a_folder_without_a_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ca\.pem"):
        TlsFolder(str(tmp_path)).channel_credentials()
