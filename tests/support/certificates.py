"""Certificates for tests: an authority and what it signs, as PEM files."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from latentwatch import secrets

_USES = (
    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"),
    *("key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
)
_NOW = datetime.datetime.now(datetime.UTC)


class Authority:
    """Signs certificates; its own is `file`."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(name)
        self.file = folder / f"{name}.pem"
        may_sign = x509.KeyUsage(**{use: use == "key_cert_sign" for use in _USES})
        constraints = x509.BasicConstraints(ca=True, path_length=0)
        certificate = self._sign(self._name, self._key.public_key(), constraints, may_sign)
        self.file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def issue(self, file: str, *names: str) -> tuple[Path, Path]:
        """Certificate and key files for these DNS names, and 127.0.0.1."""
        key = ec.generate_private_key(ec.SECP256R1())
        alternatives = [x509.DNSName(name) for name in names]
        address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        certificate = self._sign(
            _name(file), key.public_key(), x509.SubjectAlternativeName([*alternatives, address])
        ).public_bytes(serialization.Encoding.PEM)
        paths = self._folder / f"{file}.pem", self._folder / f"{file}.key"
        paths[0].write_bytes(certificate)
        paths[1].unlink(missing_ok=True)
        secrets.write(
            paths[1],
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ),
        )
        return paths

    def _sign(self, subject: x509.Name, key: Any, *extensions: Any) -> x509.Certificate:
        # With what strict clients ask for, such as Python's from 3.13 on.
        signed_by = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(_NOW - datetime.timedelta(hours=1))
            .not_valid_after(_NOW + datetime.timedelta(days=1))
        )
        for extension in (*extensions, x509.SubjectKeyIdentifier.from_public_key(key), signed_by):
            builder = builder.add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
        return builder.sign(self._key, hashes.SHA256())


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])
