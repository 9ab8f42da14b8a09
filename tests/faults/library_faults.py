"""Faults in kfac_lib: small substitutions, each the mistake of a careful person."""

from __future__ import annotations

from tests.faults.fault import Fault, replace


def _fault(name: str, module: str, old: str, new: str, *tests: str) -> Fault:
    selection = tuple(f"tests/lib/test_{test}.py" for test in tests)
    return Fault(name, replace(f"kfac_lib/{module}.py", old, new), selection)


LIBRARY_FAULTS = [
    # accumulate: the constants
    _fault("R in B instead of A", "accumulate",
           "return criterion.reduction_factor(count.denominator), 1 / (",
           "return 1, criterion.reduction_factor(count.denominator) / (",
           "kfac"),
    _fault("R in A and in B", "accumulate", "return scale_A * self.xx, scale_B * self.gg",
           "return scale_A * self.xx, scale_A * scale_B * self.gg", "kfac_is_exact"),
    _fault("1/N of B dropped", "accumulate", "1 / (count.N * sharing.divisor(S))",
           "1 / sharing.divisor(S)", "kfac_is_exact"),
    _fault("expand: N instead of N·S", "accumulate", '"""Return S."""\n        return S',
           '"""Return S."""\n        return 1', "kfac_is_exact"),
    _fault("reduce: S instead of S²", "accumulate", "return S**2", "return S", "kfac_is_exact"),
    _fault("merged sums forget the other's count", "accumulate",
           "_add(self.gg, other.gg)\n        self.count = self.count.plus(other.count)",
           "_add(self.gg, other.gg)", "accumulate"),
    _fault("different S are let through", "accumulate", "if known not in (None, S):", "if False:",
           "bad_input"),
    # rows and stream: batches and chunks
    _fault("N of the largest batch instead of all", "rows", "Count(self.N + other.N,",
           "Count(max(self.N, other.N),", "kfac"),
    _fault("data counted once a chunk", "stream", "            count = Count(0, 0)\n", "",
           "stream"),
    _fault("A summed once a chunk", "accumulate", "if rows.count.N:", "if True:", "kfac"),
    _fault("the chunk size is ignored", "stream", "size = chunk_size or len(vectors)",
           "size = len(vectors)", "stream"),
    _fault("no fallback where batching has no rule", "stream", "except RuntimeError:",
           "except KeyError:", "stream"),
    _fault("bias corner without the square of S", "rows", "self.bias**2 * len(x)",
           "self.bias * len(x)", "accumulate"),
    _fault("reduce appends 1 instead of S", "rows", "self.bias * self.S", "self.bias",
           "kfac_is_exact"),
    _fault("the lower block of a wide Gram matrix not transposed", "rows",
           "result[half:, :half] = result[:half, half:].T",
           "result[half:, :half] = result[:half, half:]", "rows"),
    # losses
    _fault("factor 2 of MSE forgotten", "losses", "else 2.0 / denominator",
           "else 1.0 / denominator", "losses"),
    _fault("softmax over the batch", "losses",
           "p = f.reshape(f.shape[0], classes, positions).softmax(1)",
           "p = f.reshape(f.shape[0], classes, positions).softmax(0)", "losses"),
    _fault("type-II root without its p qᵀ term", "losses",
           "root = -q.movedim(1, 0).unsqueeze(2) * p",
           "root = -0 * q.movedim(1, 0).unsqueeze(2) * p", "fisher"),
    _fault("K−1 columns that divide by p_K", "losses", "/ (1 + last)", "/ last", "losses"),
    _fault("columns filled at all positions at once", "losses",
           "at = torch.eye(positions, dtype=f.dtype, device=f.device)",
           "at = torch.ones(positions, 1, dtype=f.dtype, device=f.device)", "exact_blocks"),
    _fault("labels not drawn from the model", "losses", "p = f.detach().movedim(1, -1).softmax(-1)",
           "p = (f.detach() / 1.1).movedim(1, -1).softmax(-1)", "fisher"),
    _fault("noise of the wrong width", "losses", "return f.detach() + noise",
           "return f.detach() + noise / 2**0.5", "fisher"),
    _fault("an unsupported option is ignored", "losses",
           '"label_smoothing": loss_func.label_smoothing != 0,',
           "", "losses"),
    # fisher
    _fault("missing 1/√M", "fisher", " / sqrt(self.samples)", "", "fisher"),
    _fault("1/M instead of 1/√M", "fisher", " / sqrt(self.samples)", " / self.samples", "fisher"),
    _fault("the empirical Fisher of sampled labels", "fisher",
           "return criterion.gradient(f.detach(), y).unsqueeze(0)",
           "return -criterion.log_likelihood_gradient(f.detach(), criterion.sample(f, 1, None))",
           "fisher"),
    # capture
    _fault("the output tensor instead of its edge", "capture", "get_gradient_edge(z)))", "z))",
           "capture"),
    _fault("hooks left after an error", "capture", "stack.callback(handle.remove)",
           "stack.push(lambda kind, *_, hook=handle: None if kind else hook.remove())",
           "bad_input"),
    _fault("an overwritten input is let through", "capture",
           "if call.x._version != call.version:", "if False:", "bad_input"),
    _fault("a layer that ran twice keeps its first call", "capture", "if len(of_layer) > 1:",
           "if False:", "bad_input"),
    _fault("after the caller's hooks", "capture", "prepend=True", "prepend=False", "capture"),
    # algebra, damping, flattening, curvature
    _fault("A and B swapped in cvec order", "kronecker",
           "torch.kron(self.A.contiguous(), self.B.contiguous())",
           "torch.kron(self.B.contiguous(), self.A.contiguous())", "kronecker"),
    _fault("U not multiplied by the transposed A", "kronecker", "return self.B @ U @ self.A.T",
           "return self.B @ U @ self.A * self.A.sign().mean()", "kronecker"),
    _fault("exact damping without δ", "damping", "eigen.eigenvalues.clamp(min=0) + self.delta",
           "eigen.eigenvalues.clamp(min=1e-12)", "damping"),
    _fault("π upside down", "damping", "_shift(A, pi * root), _shift(B, root / pi)",
           "_shift(A, root / pi), _shift(B, pi * root)", "damping"),
    _fault("cvec is rvec", "flattening", "return tensor.permute(axes).flatten(first, last)",
           "return tensor.flatten(first, last)", "flattening"),
    _fault("bias before the weight", "curvature", "torch.cat(parts, dim=2)",
           "torch.cat(parts[::-1], dim=2)", "curvature"),
    _fault("separate bias takes the wrong corner", "kfac", "A[-1:, -1:]", "A[:1, :1]", "kfac"),
    _fault("Jacobian in the other order", "autodiff", "return flatten(rows, order, start=1)",
           "return flatten(rows, 'rvec', start=1)", "autodiff"),
    _fault("dropout is let through", "stream", "    check_per_datum(model)\n", "", "bad_input"),
]  # fmt: skip
