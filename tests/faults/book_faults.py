"""Faults in the stored notebooks and in the built site."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from tests.faults.fault import Fault, Put, StaleFaultError
from tests.faults.library_faults import LIBRARY_FAULTS

FIRST, KFAC = "01_flattening", "08_kfac"
STATE = re.compile(
    r'(<script type="application/vnd.jupyter.widget-state\+json">)(.*?)(</script>)', re.S
)
GUARD = ("tests/book", "-k", FIRST)


def notebook(name: str, change: Callable[[list[dict]], bool]) -> Put:
    """Change the code cells of a stored notebook; the function says whether it found a place."""

    def put(root: Path) -> None:
        path = root / "book" / f"{name}.ipynb"
        content = json.loads(path.read_text())
        cells = [c for c in content["cells"] if c["cell_type"] == "code" and "".join(c["source"])]
        before = json.dumps(cells)
        if not change(cells) or json.dumps(cells) == before:
            raise StaleFaultError(f"{name}.ipynb has no cell for this fault")
        path.write_text(json.dumps(content))

    return put


def stale_output(cells: list[dict]) -> bool:
    for cell in cells:
        for output in cell["outputs"]:
            if output["output_type"] == "stream" and "".join(output["text"]).strip():
                output["text"] = ["what an earlier version printed\n"]
                return True
    return False


def unexecuted(cells: list[dict]) -> bool:
    cells[-1].update(execution_count=None, outputs=[])
    return True


def out_of_order(cells: list[dict]) -> bool:
    counts = [cell["execution_count"] for cell in cells]
    for cell, count in zip(cells, reversed(counts), strict=True):
        cell["execution_count"] = count
    return len(cells) > 1


def stderr(cells: list[dict]) -> bool:
    cells[0]["outputs"].append({"output_type": "stream", "name": "stderr", "text": ["a warning\n"]})
    return True


def may_fail(cells: list[dict]) -> bool:
    cells[0]["metadata"]["tags"] = ["raises-exception"]
    return True


def figure_without_alt(cells: list[dict]) -> bool:
    cells[0]["outputs"].append(
        {
            "output_type": "display_data",
            "metadata": {},
            "data": {"image/png": "", "text/plain": "x"},
        }
    )
    cells[0]["metadata"].pop("mystnb", None)
    return True


def page(name: str, change: Callable[[str], str]) -> Put:
    """Change a page of the built site."""

    def put(root: Path) -> None:
        path = root / "_build" / "html" / f"{name}.html"
        text = path.read_text()
        changed = change(text)
        if changed == text:
            raise StaleFaultError(f"{name}.html has no place for this fault")
        path.write_text(changed)

    return put


def in_article(html: str) -> Callable[[str], str]:
    """Put a piece of html at the end of the article, still inside its last section."""
    return lambda text: re.sub(r"</section>(?!.*</section>)", html + "</section>", text, flags=re.S)


def widgets(change: Callable[[list[dict]], None]) -> Callable[[str], str]:
    """Change the widget models that a page stores."""

    def changed(text: str) -> str:
        def rewrite(match: re.Match[str]) -> str:
            content = json.loads(match[2])
            change(list(content["state"].values()))
            return match[1] + json.dumps(content).replace("</", "<\\/") + match[3]

        return STATE.sub(rewrite, text, count=1)

    return changed


def cut_links(models: list[dict]) -> None:
    for model in models:
        if model["model_name"] in ("LinkModel", "DirectionalLinkModel"):
            model["state"]["target"] = model["state"]["source"]


def repeat_a_frame(models: list[dict]) -> None:
    frames = [m["state"] for m in models if str(m["state"].get("value")).startswith("<img")]
    source = re.compile(r'src="[^"]*"')
    image = source.search(frames[0]["value"])
    frames[1]["value"] = source.sub(lambda _: image[0], frames[1]["value"])


def nameless_frame(models: list[dict]) -> None:
    frame = next(m["state"] for m in models if str(m["state"].get("value")).startswith("<img"))
    frame["value"] = re.sub(r'alt="[^"]*"', 'alt="A picture"', frame["value"])


def _site(name: str, change: Callable[[str], str], test: str, selection: str) -> Fault:
    return Fault(
        name,
        page(FIRST, change),
        (f"tests/site/test_{test}.py", "-k", f"({selection}) and {FIRST}"),
        True,
    )


# Library faults that a chapter's own checks must notice, whatever the library's tests say.
NOTICED = {
    FIRST: {
        "A and B swapped in cvec order",
        "the permutation of the transposed shape",
        "back with the sizes in the wrong order",
        "cvec is rvec",
    },
    "02_jacobians": {
        "a VJP with half the vector",
        "a JVP in the direction of ones",
        "bias before the weight",
        "Jacobian in the other order",
    },
    "03_hessians": {
        "mixed blocks the wrong way round",
        "rows and columns exchanged",
    },
    "04_gauss_newton": {
        "a GGN that is the Hessian",
        "a product with the Jacobian twice",
        "linearized without the value at the anchor",
        "linearized around zero",
    },
    "05_likelihoods": {
        "factor 2 of MSE forgotten",
        "labels not drawn from the model",
        "noise of the wrong width",
        "label smoothing is ignored",
        "class weights counted in N, not in R",
        "probabilities divided by their number of classes",
        "pos_weight for every label",
        "a root without weights",
    },
    "06_fisher": {
        "missing 1/√M",
        "labels enumerated with r instead of √r",
        "sigma points with weight 1/K",
        "signs that are 0 or 1",
        "the empirical Fisher of sampled labels",
        "a Fisher without R",
        "a matrix of the flavour without one",
    },
    "07_kronecker": {
        "A and B swapped in cvec order",
        "U not multiplied by the transposed A",
        "the nearest product of the other order",
    },
    KFAC: {
        "R in B instead of A",
        "1/N of B dropped",
        "expand: N instead of N·S",
        "A summed once a chunk",
        "factor 2 of MSE forgotten",
        "type-II root without its p qᵀ term",
        "labels not drawn from the model",
        "missing 1/√M",
        "the empirical Fisher of sampled labels",
        "the output tensor instead of its edge",
        "bias before the weight",
    },
    "09_testing": {
        "1/N of B dropped",
        "numbers that are off by half count as right",
        "missing 1/√M",
    },
    "10_constants": {
        "reduce: S instead of S²",
        "reduce appends 1 instead of S",
        "N of the largest batch instead of all",
        "factor 2 of MSE forgotten",
    },
    "11_damping": {
        "exact damping without δ",
        "π upside down",
    },
}


def read_by(chapter: str) -> tuple[str, ...]:
    return ("--nbval", "--nbval-cell-timeout", "120", f"book/{chapter}.ipynb")


def in_code(chapter: str, old: str, new: str) -> Fault:
    """Make a mistake in the code of a chapter; the chapter's own checks must notice it."""

    def change(cells: list[dict]) -> bool:
        hits = [cell for cell in cells if old in "".join(cell["source"])]
        if len(hits) == 1:
            hits[0]["source"] = "".join(hits[0]["source"]).replace(old, new)
        return len(hits) == 1

    return Fault(f"{chapter}: {new.strip()[:40]}", notebook(chapter, change), read_by(chapter))


CHAPTER_FAULTS = [
    Fault(f"{chapter}: {fault.name}", fault.put, read_by(chapter))
    for chapter, noticed in NOTICED.items()
    for fault in LIBRARY_FAULTS
    if fault.name in noticed
]
if len(CHAPTER_FAULTS) != sum(map(len, NOTICED.values())):
    raise StaleFaultError("a fault that a chapter should notice is gone")

# Mistakes in a chapter's own code.
MISTAKES = [
    in_code("02_jacobians", '("cvec", torch.kron(A, B)),', '("cvec", torch.kron(B, A)),'),
    in_code("02_jacobians", "pulled = pulled * (1 - output**2)", "pulled = pulled * (1 - output)"),
    in_code("02_jacobians", "half_way = J_r[p_f]  #", "half_way = J_r[p_f][:, p_x]  #"),
    in_code("02_jacobians", "torch.cat([torch.kron(X_tilde, e[None]) for e in I])",
            "torch.kron(X_tilde, I)"),
    in_code("03_hessians", '"CE": p.diag() - torch.outer(p, p),',
            '"CE": p.diag() + torch.outer(p, p),'),
    in_code("03_hessians", "(product,) = torch.autograd.grad(slope, x)",
            "(product,) = torch.autograd.grad(slope / 2, x)"),
    in_code("03_hessians", '{"sum": 2, "mean": 2 / (N * K)}', '{"sum": 2, "mean": 1 / (N * K)}'),
    in_code("04_gauss_newton", "kept = 2 * (2 * t) ** 2", "kept = 2 * (2 * t)"),
    in_code("04_gauss_newton", "(HJv,) = grad(slope, f, Jv, retain_graph=True)", "HJv = Jv"),
    in_code("04_gauss_newton", "R = 2 / Y.numel()", "R = 1 / Y.numel()"),
    in_code("05_likelihoods", "top = 2 if isinstance(loss_func, nn.MSELoss) else 1", "top = 1"),
    in_code("05_likelihoods", "cumulated = f.softmax(1).cumsum(1)  # (N, K)",
            "cumulated = f.softmax(0).cumsum(1)  # (N, K)"),
    in_code("05_likelihoods", "slope = kappa * p_ - a", "slope = p_ - a"),
    in_code("06_fisher", "return -log_p_gradients / sqrt(M)", "return -log_p_gradients"),
    in_code("06_fisher", "1.05 * right[:M]", "1.00 * right[:M]"),
    in_code("06_fisher", "return p.sqrt().diag() - torch.outer(p, p.sqrt())",
            "return p.sqrt().diag() - torch.outer(p.sqrt(), p)"),
    in_code("07_kronecker", 'torch.kron(x_n, g_n)\n            if order == "cvec"',
            'torch.kron(x_n, g_n)\n            if order == "rvec"'),
    in_code("07_kronecker", '"inverse": (2 * D**3, 2 * D_in**3 + 2 * D_out**3)',
            '"inverse": (2 * D**3, 2 * D_in**3 + D_out**3)'),
    in_code("07_kronecker", "product = Kronecker(R * a.sum(0), b.mean(0))",
            "product = Kronecker(R * a.sum(0), b.sum(0))"),
    in_code("08_kfac", "A, B = R * a.sum(0), b.mean(0)", "A, B = R * a.sum(0), b.sum(0)"),
    in_code("08_kfac", 'B = torch.einsum("vno,vnp->op", g, g) / N',
            'B = torch.einsum("vno,vnp->op", g, g)'),
    in_code("08_kfac", "partners = sum(b.roll(-k, 0) for k in range(shifts)) / shifts",
            "partners = sum(b.roll(-k, 0) for k in range(shifts))"),
    in_code("09_testing", "p = f.softmax(dim=1)", "p = f.softmax(dim=0)"),
    in_code("09_testing", "q.std(dim=1) / len(draws) ** 0.5", "q.std(dim=1) / len(draws)"),
    in_code("11_damping", "B_damped = B + delta**0.5 / pi * torch.eye(len(B))",
            "B_damped = B + delta**0.5 * pi * torch.eye(len(B))"),
    in_code("11_damping", "A_bar / (1 - beta**ell)", "A_bar / (1 - beta)"),
    in_code("10_constants", "CRITERION_WITHOUT_HALF = 2", "CRITERION_WITHOUT_HALF = 1"),
    in_code("10_constants", "to_A, to_B = task.R * task.N / V**0.5, V**0.5",
            "to_A, to_B = task.R / V**0.5, V**0.5"),
    in_code("12_weight_sharing", "images = F.pad(images, [padding] * 4, mode=mode)",
            'images = F.pad(images, [padding] * 4, mode="constant")'),
    in_code("12_weight_sharing", "(N * S**2)", "(N * S)"),
    in_code("12_weight_sharing", "apart = 1 - torch.eye(S)", "apart = torch.ones(S, S)"),
    in_code("13_ekfac", "return R * beta.T @ alpha", "return beta.T @ alpha"),
    in_code("13_ekfac", "return R * turned_P.square().sum(dim=(0, 1))",
            "return R * turned_P.sum(dim=(0, 1)).square()"),
    in_code("13_ekfac", "h = -rvec(element.inverse(Exact(delta)) @ U)",
            "h = -rvec(element @ U)"),
    in_code("14_functional", "turns += node.target is aten.matmul.default",
            "turns += node.target is aten.linear.default"),
    in_code("14_functional", "/ (x.shape[0] * x.shape[1])", "/ x.shape[0]"),
    in_code("14_functional", "gs[use.weight].append(g.reshape",
            "gs[use.weight].insert(0, g.reshape"),
    in_code("15_diagnostics", "return R**2 * (XX * T).sum()", "return R * (XX * T).sum()"),
    in_code("15_diagnostics", "corrected = R * beta.T @ (x @ Q_A).square()",
            "corrected = beta.T @ (x @ Q_A).square()"),
    in_code("15_diagnostics", 'torch.einsum("nm,vno,wmo->nvmw", x @ x.T, g, g)',
            'torch.einsum("nm,vno,wmo->nvmw", (x @ x.T) ** 2, g, g)'),
    in_code("16_damping_sensitivity", "return 2 / float(torch.linalg.eigvalsh(both)[-1])",
            "return 2 / float(torch.linalg.eigvalsh(both)[0])"),
    in_code("16_damping_sensitivity", "factor = 1 - rate * lam / divided_by(form, delta)",
            "factor = 1 - rate * lam / (lam + delta)"),
    in_code("16_damping_sensitivity", "return 2 / largest", "return 1 / largest"),
    in_code("17_training", "scale = min(1.0, (setting", "scale = max(1.0, (setting"),
    in_code("17_training", "math.comb(n - i, k) / math.comb(n, k) >= 0.5",
            "math.comb(n - i, k) / math.comb(n, k) >= 0.4"),
    in_code("17_training", "return round(1 - x, 6) if name in DECAYS else x", "return x"),
]  # fmt: skip

NOTEBOOK_FAULTS = [
    *CHAPTER_FAULTS,
    *MISTAKES,
    Fault("a stale output", notebook(FIRST, stale_output),
          read_by(FIRST)),
    Fault("an unexecuted cell", notebook(FIRST, unexecuted), GUARD),
    Fault("cells executed out of order", notebook(FIRST, out_of_order), GUARD),
    Fault("a cell with stderr", notebook(FIRST, stderr), GUARD),
    Fault("a cell that may fail", notebook(FIRST, may_fail), GUARD),
    Fault("a figure of a notebook without alt", notebook(FIRST, figure_without_alt), GUARD),
]  # fmt: skip

SITE_FAULTS = [
    _site("an external picture", in_article('<img alt="far away" src="https://example.org/far.png">'),
          "pages", "another_host"),
    _site("a link that leads nowhere", in_article('<p><a href="nowhere.html">there</a></p>'),
          "links", "internal_link"),
    _site("an anchor that is not there",
          in_article(f'<p><a href="{KFAC}.html#nowhere">there</a></p>'),
          "links", "internal_link"),
    _site("a formula that is not typeset", in_article("<p>so that $x_n$ holds</p>"),
          "pages", "typeset"),
    _site("a formula with an error",
          in_article(r'<div class="math notranslate">\[\frac{1}\]</div>'),
          "pages", "typeset"),
    _site("an image without alt", in_article('<img src="_static/favicon.svg">'),
          "pages", "violation"),
    _site("text too pale to read", in_article('<p style="color: #ddd; background: #eee">pale</p>'),
          "pages", "violation"),
    _site("an error in the console", in_article("<script>undefinedFunction()</script>"),
          "pages", "console"),
    _site("wider than a phone", in_article('<p style="width: 700px">wide</p>'), "pages", "phone"),
    _site("a dead control", widgets(cut_links), "controls", "every_position and http"),
    _site("two positions with one picture", widgets(repeat_a_frame), "controls",
          "every_position and http"),
    _site("a frame whose alt text names no position", widgets(nameless_frame), "controls",
          "every_position and http"),
    Fault("a search without an index",
          lambda root: (root / "_build/html/searchindex.js").write_text("Search.setIndex({})"),
          ("tests/site/test_links.py", "-k", "search_finds and http"), True),
]  # fmt: skip
