"""A throw-away authority for one run of the cluster, and a certificate of it for each process."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from workers.tls import CA_FILE, CERTIFICATE_FILE, KEY_FILE, TLS_NAME

LIFETIME = timedelta(days=365)  # a server that runs longer wants certificates that somebody renews
CLOCK_SKEW = timedelta(hours=1)


@contextlib.contextmanager
def throw_away_certificates(processes: Sequence[str]) -> Iterator[Path]:
    """A temporary folder that only this user can enter, with a ``TlsFolder`` for each of ``processes`` in it.

    The authority's key is in no file and is gone when this returns: nobody can join the cluster later.
    """
    with tempfile.TemporaryDirectory(prefix="twinpool-tls-") as folder:  # mode 0700
        write_certificates(Path(folder), processes)
        yield Path(folder)


def write_certificates(folder: Path, processes: Sequence[str]) -> None:
    """Makes an authority, and writes ``folder/process/`` for each process."""
    authority_key = ec.generate_private_key(ec.SECP256R1())
    authority = _certificate("twinpool throw-away authority", authority_key, None, authority_key)
    for process in processes:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _certificate(process, key, authority, authority_key)
        own = folder / process
        own.mkdir(mode=0o700)
        _write(own / CA_FILE, authority.public_bytes(serialization.Encoding.PEM))
        _write(own / CERTIFICATE_FILE, certificate.public_bytes(serialization.Encoding.PEM))
        _write(own / KEY_FILE, _pem(key))


def _certificate(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: x509.Certificate | None,
    issuer_key: ec.EllipticCurvePrivateKey,
) -> x509.Certificate:
    """Without an issuer: its own, of an authority."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + LIFETIME)
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=0 if issuer is None else None), True)
    )
    if issuer is not None:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(TLS_NAME)]), False)
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), False)
    return builder.sign(issuer_key, hashes.SHA256())


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(file: Path, content: bytes) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "wb") as opened:
        opened.write(content)
