"""What a kernel body may say: the language of kernels, and nothing that runs while it is compiled."""

from __future__ import annotations

import pytest

from foveal.search.templates.rows import SIGNATURE, START
from foveal.search.verify.static import LONGEST, StaticError, check

HEAD = "def kernel(p_x, p_w, p_o, columns, TILE):\n"


def body(text: str) -> dict[str, object]:
    return {"kind": "template", "text": text, "signature": list(SIGNATURE)}


def test_the_body_that_a_search_starts_with_is_allowed() -> None:
    check(body(START))
    check(body(START + "\ndef twice(x):\n    return x + x\n"))


@pytest.mark.parametrize(
    "text",
    [
        "import os\n" + START,
        "x = 1\n" + START,
        "@triton.jit\n" + START.strip(),
        START.replace("TILE)", "TILE=4)"),
        START.replace("columns, TILE", "columns, TILE, more"),
        HEAD + "    import os\n",
        HEAD + "    __import__('os')\n",
        HEAD + "    open('x')\n",
        HEAD + "    getattr(tl, 'load')\n",
        HEAD + "    isinstance(p_x, int)\n",
        HEAD + "    tl.__class__\n",
        HEAD + "    tl._builder\n",
        HEAD + "    tl.inline_asm_elementwise('', '', [], tl.float32, False, 1)\n",
        HEAD + "    tl.static_print(1)\n",
        HEAD + "    f'{columns}'\n",
        HEAD + "    [x for x in range(3)]\n",
        HEAD + "    (lambda: 1)()\n",
        HEAD + "    global tl\n",
        HEAD + "    tl = 1\n",
        HEAD + "    torch.empty(1)\n",
        HEAD + "    while True:\n        pass\n    else:\n        yield\n",
        "def other(p_x):\n    pass\n",
        "class kernel:\n    pass\n",
        "not python (",
        HEAD + "    pass\n" + "#" * LONGEST,
    ],
)
def test_everything_else_is_refused(text: str) -> None:
    with pytest.raises(StaticError):
        check(body(text))
