"""Mutual TLS between the processes of a cluster: each shows a certificate of the cluster's own authority.

A folder has three files in PEM, as certificate managers write them under these or like names::

    ca.pem      the authority; whoever has a certificate of it is let in, and nobody else
    cert.pem    this process's certificate, for the DNS name ``TLS_NAME``, to serve and to call with
    key.pem     its private key
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import grpc

from kvcache.errors import ConfigError

# Every process has the same name, whatever its address: the authority is the cluster's own, so its word is enough.
TLS_NAME = "twinpool"
CA_FILE, CERTIFICATE_FILE, KEY_FILE = "ca.pem", "cert.pem", "key.pem"


@dataclass(frozen=True, slots=True)
class TlsFolder:
    """Of one process. Keys stay in their files until they are used."""

    path: str

    def server_credentials(self) -> grpc.ServerCredentials:
        """Refuses a caller without a certificate.

        Raises:
            ConfigError: a file cannot be read.
        """
        key_and_chain = (self._read(KEY_FILE), self._read(CERTIFICATE_FILE))
        return grpc.ssl_server_credentials(
            [key_and_chain], root_certificates=self._read(CA_FILE), require_client_auth=True
        )

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """
        Raises:
            ConfigError: a file cannot be read.
        """
        return grpc.ssl_channel_credentials(self._read(CA_FILE), self._read(KEY_FILE), self._read(CERTIFICATE_FILE))

    def _read(self, name: str) -> bytes:
        try:
            return Path(self.path, name).read_bytes()
        except OSError as error:
            raise ConfigError(f"--grpc-tls-dir: {name} in {self.path} cannot be read: {error.strerror}.") from None
