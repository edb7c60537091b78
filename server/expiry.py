"""How long the server's certificate is still valid, in words, and what to do about it."""

from __future__ import annotations

from cryptography import x509

from server.federation import Folder
from server.pki import days_left

SOON = 30  # days


def expiry(folder: Folder) -> tuple[str, bool]:
    """One line on the server's certificate, and whether it is still valid."""
    days = days_left(x509.load_pem_x509_certificate(folder.server_cert.read_bytes()))
    advice = f"; renew it: consilium provision {folder.federation} --out {folder.path}" if days < SOON else ""
    return (
        f"certificate: {f'valid for {round(days)} days' if days > 0 else 'EXPIRED, no site can connect'}{advice}",
        days > 0,
    )
