"""What the page looks like: two sidebars around the chat and the question box (SPEC G2)."""

from __future__ import annotations

from typing import Any

import gradio as gr

AUTO = "auto"
"""No choice of a mode or a modifier: the cascade chooses."""
EXAMPLES = 'Examples: JSON lines with "question" and "answer"'
"""Label of the box for a file of examples, while it is empty."""
FORMULAS = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "\\(", "right": "\\)", "display": False},
]
HELP = "Kept in this browser only. Enter sends, Shift+Enter breaks the line, Esc stops, Alt+N is new."
WELCOME = "### Ask something\nBelow each answer stands how sure it is, and why."


class Controls:
    """The components that events read or change, made within an open `gr.Blocks`."""

    def __init__(self) -> None:
        with gr.Sidebar(position="left", width=260, open=False) as self.sidebar:
            gr.Markdown("# Cogumi")
            self.new = gr.Button("New conversation", elem_id="new", variant="primary", size="sm")
            self.history = gr.Radio([], label="Last conversations", elem_id="history", interactive=True)
            self.markdown = gr.Button("Save as Markdown", size="sm", elem_id="markdown")
            self.json = gr.Button("Save as JSON", size="sm", elem_id="json")
            self.forget = gr.Button("Delete all conversations", size="sm", variant="stop", elem_id="forget")
            gr.Markdown(HELP)
        with gr.Sidebar(position="right", width=300, open=False):
            gr.Markdown("## Settings")
            self._settings()
        self.chat = gr.Chatbot(
            show_label=False,
            elem_id="chat",
            scale=1,
            height="100%",
            min_height=200,
            buttons=["copy"],
            placeholder=WELCOME,
            latex_delimiters=FORMULAS,
        )
        self.question = gr.Textbox(
            placeholder="Your question",
            label="Your question",
            show_label=False,
            elem_id="question",
            submit_btn=True,
            max_lines=8,
            interactive=False,  # until the browser has begun a conversation
        )
        self.conversation = gr.JSON({}, visible="hidden")  # always empty: the place of an event's input
        self.view = gr.JSON({}, visible="hidden")

    def _settings(self) -> None:
        self.mode = gr.Dropdown([AUTO], value=AUTO, label="Mode", elem_id="mode")
        self.modifier = gr.Dropdown([AUTO], value=AUTO, label="Modifier", elem_id="modifier")
        self.decline = gr.Checkbox(label="Decline instead of guessing", elem_id="decline")
        self.reasons = gr.Checkbox(True, label="Show how sure and why", elem_id="reasons")
        self.system = gr.Textbox(
            label="System prompt", lines=2, max_lines=6, info="P(correct) holds without one only.", elem_id="system"
        )
        self.temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature")
        self.top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top p")
        self.max_tokens = gr.Slider(16, 4096, 512, step=16, label="Max tokens")
        self.seed = gr.Number(-1, label="Seed", info="-1: another one for every answer.", precision=0, minimum=-1)
        self.file = gr.File(label=EXAMPLES, file_types=[".jsonl"], height=110, elem_id="examples")
        self.examples = gr.JSON([], visible="hidden")

    @property
    def settings(self) -> list[Any]:
        """The components whose values every question is sent with, in the order of `actions.Settings`."""
        sampling = [self.temperature, self.top_p, self.max_tokens, self.seed]
        return [self.mode, self.modifier, self.decline, self.system, *sampling, self.examples]
