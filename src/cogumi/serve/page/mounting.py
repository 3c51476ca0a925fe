"""Mounts the page on the server's application (SPEC G2, G6)."""

from __future__ import annotations

import ssl
from pathlib import Path

import gradio as gr
from fastapi import FastAPI

from cogumi.serve.api_keys import KeyFile
from cogumi.serve.page.actions import connect
from cogumi.serve.page.api_client import ApiClient
from cogumi.serve.page.controls import Controls

HOUR = 3600
"""Seconds after which uploaded files, which were read at once, are deleted."""
_HERE = Path(__file__).parent


def mount_page(
    app: FastAPI,
    path: str,
    url: str,
    *,
    keys: KeyFile | None = None,
    certificate: Path | None = None,
    largest: int = 2**20,
) -> None:
    """Mount the page at `path`, as a client of the API at `url`; uploads may have `largest` bytes.

    With `keys` a person signs in with the name of a key and the key itself, and asks with it. `certificate` is the
    server's own, which the page then trusts whatever names it is made out to.
    """
    signed_in: dict[str, str] = {}

    def sign_in(name: str, secret: str) -> bool:
        found = keys.find(secret) if keys else None
        if found is None or found.name != name:
            return False
        signed_in[name] = secret
        return True

    client = ApiClient(url, _trusted(certificate))
    with gr.Blocks(title="Cogumi", analytics_enabled=False, fill_height=True, delete_cache=(HOUR, HOUR)) as blocks:
        connect(blocks, Controls(), client, lambda request: signed_in.get(request.username or ""))
    gr.mount_gradio_app(
        app,
        blocks,
        path,
        auth=sign_in if keys else None,
        auth_message="Sign in with the name of an API key and the key (cogumi keys add NAME)." if keys else None,
        footer_links=[],
        run_history=False,
        max_file_size=largest,
        theme=_theme(),
        css=(_HERE / "page.css").read_text("utf-8"),
        head=f"<script>{(_HERE / 'page.js').read_text('utf-8')}</script>",
        mcp_server=False,
        pwa=False,
        ssr_mode=False,
        enable_monitoring=False,
    )


def _theme() -> gr.themes.Base:
    """Fonts of the reader's machine, none from a network; colours with a contrast of at least 4.5."""
    theme = gr.themes.Default(
        primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    return theme.set(
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        input_placeholder_color="*neutral_500",
    )


def _trusted(certificate: Path | None) -> ssl.SSLContext | bool:
    if certificate is None:
        return True
    context = ssl.create_default_context(cafile=str(certificate))
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # the server's own certificate is enough
    return context
