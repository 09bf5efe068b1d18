"""README.md and the guide: their code runs as one script, their commands and links exist."""

import re
import textwrap
from pathlib import Path

import pytest
import torch
from budget import assert_bitwise

import ra_triton
from ra_triton.nn import RACausalSelfAttention

ROOT = Path(__file__).parents[2]
SCRIPT = ("README.md", "docs/guide.md")  # the guide goes on from the README
PAGES = (*SCRIPT, "docs/results.md", "docs/status.md", "docs/flex.md", "CONTRIBUTING.md")
# What a reader has at hand where a section starts, and the pages do not spell out.
SURROUNDINGS = {
    "In nanoGPT": """
        from types import SimpleNamespace
        from bench.models.gpt import GPTConfig
        config = GPTConfig(block_size=16, vocab_size=31, n_layer=2, n_head=2, n_embd=32)
        self = SimpleNamespace()
        """,
    "In a GPT": """
        from bench.models.gpt import GPT
        model = GPT(config, RACausalSelfAttention.from_config)
        hf_model = stock_gpt2(config)
        """,
    "In a newer model": """
        q, k, v = ra_triton.project(x, W_fused)
        cos, sin = torch.rand(2, 300, 32)
        step, q_weight, k_weight = 7, torch.ones(64), torch.ones(64)
        """,
    "Generation": """
        batch, max_len, n_kv_head, head_dim, dtype, device = 2, 16, 4, 128, torch.float32, "cpu"
        prompt, token = torch.randn(2, 5, 2048), torch.randn(2, 1, 2048)
        length, beams = 5, torch.tensor([1, 0])
        """,
    "CUDA graphs": """
        layer = RACausalSelfAttention(128, 2).cuda().requires_grad_(False)
        x, next_batch = torch.randn(2, 2, 64, 128, device="cuda")
        """,
    "Variable lengths": """
        q, k, v = torch.randn(3, 12, 3, 64)
        """,
}
NEEDS_A_GPU = {"CUDA graphs"}
NEEDS = {"from bench.huggingface": "safetensors"}  # by how a block begins


def blocks() -> list[tuple[str, str]]:
    """``(section, code)`` of the pages' Python, in order; no two sections have one name."""
    found = []
    script = "".join((ROOT / page).read_text() for page in SCRIPT)
    for part in re.split(r"^## ", script, flags=re.MULTILINE)[1:]:
        section = part.partition("\n")[0]
        code = re.findall(r"^```python\n(.*?)^```$", part, re.DOTALL | re.MULTILINE)
        found += [(section, block) for block in code]
    return found


def stock_gpt2(config):
    """Hugging Face's own model of these sizes; where it is not installed, what keeps a state."""
    try:
        import transformers
    except ImportError:
        return Stock()
    sizes = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_positions=config.block_size, vocab_size=config.vocab_size, **sizes
        )
    )


class Stock:
    """Takes and gives a state dict."""

    def load_state_dict(self, state):
        self.state = dict(state)

    def state_dict(self):
        return self.state


def installed(package: str) -> bool:
    try:
        __import__(package)
    except ImportError:
        return False
    return True


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """The script's variables after its last line, and ``kept``: y after each block that made one.

    What needs a GPU or a package that is not there is compiled, not run.
    """
    variables = {"stock_gpt2": stock_gpt2, "kept": []}
    known = {section for section, _ in blocks()}
    assert set(SURROUNDINGS) <= known
    assert known >= NEEDS_A_GPU
    begun = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("readme"))
        torch.manual_seed(0)
        for section, code in blocks():
            compiled = compile(code, section, "exec")
            packages = [package for start, package in NEEDS.items() if code.startswith(start)]
            if section in NEEDS_A_GPU and not torch.cuda.is_available():
                continue
            if not all(map(installed, packages)):
                continue
            scope = dict(variables) if section in NEEDS_A_GPU else variables  # others are on a CPU
            if section not in begun:
                exec(textwrap.dedent(SURROUNDINGS.get(section, "")), scope)
                begun.add(section)
            if code.startswith("from bench.huggingface"):
                from bench.huggingface import save_gpt2

                save_gpt2(variables["model"], "gpt2")
            exec(compiled, scope)
            if "y" in scope:
                variables["kept"].append((section, scope.pop("y")))
    return variables


def test_the_pages_run_as_one_script(names):
    made = [section for section, _ in names["kept"]]
    expected = ["Five lines of use"] * 2 + ["Generation", "Variable lengths"]
    expected += ["Int8 weights", "2:4 sparse weights"]
    assert [section for section in made if section not in NEEDS_A_GPU] == expected
    for section, y in names["kept"]:
        assert y.isfinite().all(), section
    assert len(blocks()) >= 11  # none is overlooked
    assert isinstance(names["self"].attn, RACausalSelfAttention)


@pytest.mark.parametrize("section", ["Int8 weights", "2:4 sparse weights"])
def test_a_weight_for_inference_is_made_of_the_weight_above(section, names):
    """A weight that is read in another order is another layer: its error is that of no layer."""
    (_, first), *_ = names["kept"]
    y = dict(names["kept"])[section]
    assert (y - first).norm() < first.norm()
    with torch.no_grad():
        other = ra_triton.ra_attention(names["x"], names["W_fused"], weight_layout="packed")
    assert (other - first).norm() > first.norm()  # which is what the line above would see


@torch.no_grad()
def test_the_packed_weight_is_the_split_one_reordered(names):
    factors = [names[n] for n in ("W_q", "W_k", "W_v", "W_recip")]
    split = ra_triton.compose_weights(*factors, n_head=12)
    assert_bitwise(ra_triton.unpack_weight(names["W_packed"], 4, n_head=12), split)


def test_commands_of_the_pages_exist():
    """Make's targets, and the scripts, of the pages that newcomers read."""
    targets = re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for page in (*PAGES, "bench/PROTOCOL.md"):
        text = (ROOT / page).read_text()
        named = re.findall(r"(?:^|`)make ((?:[a-z][a-z-]* ?)+)", text, re.MULTILINE)
        assert {word for words in named for word in words.split()} <= set(targets), page
        scripts = re.findall(r"python ((?:bench|tests)/[\w/]+\.py)", text)
        assert [script for script in scripts if not (ROOT / script).is_file()] == [], page


@pytest.mark.parametrize("page", PAGES)
def test_links_of_the_pages_lead_somewhere(page):
    """Files exist, and so do the sections that a link names."""
    text = (ROOT / page).read_text()
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        path, _, section = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if section:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert section in map(anchor, titles), link


def anchor(title: str) -> str:
    """A title as GitHub writes it into links."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
