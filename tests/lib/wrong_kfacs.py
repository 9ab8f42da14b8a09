"""One KFAC that is right and many that are wrong, written from the formulas alone.

`Recipe` takes every step in a method of its own. An entry of `ZOO` overrides what its fault needs
and nothing else. `RIGHT` has the recipe without faults, in every form of the output.

    A = R Σ_n Σ_s x̃ x̃ᵀ          B = 1/(N S)  Σ_n Σ_s Σ_v g gᵀ            (expand)
    A = R Σ_n (Σ_s x̃)(Σ_s x̃)ᵀ   B = 1/(N S²) Σ_n Σ_v (Σ_s g)(Σ_s g)ᵀ     (reduce)
"""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

import torch
from torch import nn
from torch.nn.functional import one_hot

LOSSES = {nn.MSELoss: "MSE", nn.CrossEntropyLoss: "CE", nn.BCEWithLogitsLoss: "BCE"}


class Recipe:
    """KFAC, step by step. The prediction is seen as (N, K, T), a layer's rows as (N, S, D)."""

    KINDS = (nn.Linear,)

    def __init__(self, model, loss_func, data, fisher, sharing):
        self.model, self.loss, self.fisher = model, loss_func, fisher
        self.X, self.y = data
        self.flavour, self.sharing = type(fisher).__name__, type(sharing).__name__
        self.kind = LOSSES.get(type(loss_func))

    def run(self):
        self.check()
        with torch.enable_grad():
            self.forward()
            self.look_at_targets()
            self.g = self.gradients(self.deltas())
        result = {}
        for name in self.layers:
            A, B = self.finish(name, self.A(name), self.B(name))
            result.update(self.result(name, A, B))
        return result

    def check(self):
        if self.kind is None or self.loss.reduction not in ("mean", "sum"):
            raise NotImplementedError(f"{self.loss}")
        if self.flavour not in ("TypeII", "TypeI", "MonteCarlo", "Empirical"):
            raise NotImplementedError(self.flavour)
        if self.sharing not in ("Expand", "Reduce"):
            raise NotImplementedError(self.sharing)
        for layer in self.model.modules():
            own = any(True for _ in layer.parameters(recurse=False))
            if own and not isinstance(layer, self.KINDS):
                raise NotImplementedError(f"a layer of the kind {type(layer).__name__}")

    # Forward pass.

    def forward(self):
        self.layers = {n: m for n, m in self.model.named_modules() if isinstance(m, self.KINDS)}
        self.inputs, self.graph_inputs, self.outputs = {}, {}, {}
        handles = [
            layer.register_forward_hook(
                lambda layer, args, z, name=name: self.remember(name, args[0], z)
            )
            for name, layer in self.layers.items()
        ]
        try:
            self.f = self.call()
        finally:
            for handle in handles:
                handle.remove()
        if self.inputs.keys() != self.layers.keys():
            raise NotImplementedError("a layer that is not called")
        self.names = list(self.inputs)  # in the order of the calls
        if any(x.ndim < 2 or len(x) != len(self.f) for x in self.inputs.values()):
            raise NotImplementedError("axis 0 of a layer's input is not the datum")
        K = self.f.shape[1] if self.f.ndim > 1 else 1
        self.logits = self.f.detach().reshape(len(self.f), K, -1)

    def call(self):
        return self.model(self.X)

    def remember(self, name, x, z):
        if name in self.inputs:
            raise NotImplementedError("a layer that is called twice")
        self.inputs[name], self.graph_inputs[name] = x.detach().clone(), x
        self.outputs[name] = z if z.requires_grad else z.detach().requires_grad_()
        return self.outputs[name].clone()  # what comes next may work in place

    # Loss: targets, weights, reduction factor.

    def look_at_targets(self):
        N, K, T = self.logits.shape
        self.valid = torch.ones(N, T, dtype=torch.bool)
        self.weight = torch.ones(K, dtype=self.logits.dtype)
        if self.kind == "CE":
            if self.y.is_floating_point() or self.f.ndim < 2:
                raise NotImplementedError("class probabilities")
            labels = self.y.reshape(N, T)
            self.valid = labels != self.loss.ignore_index
            self.labels = labels.where(self.valid, 0)
            if self.loss.weight is not None:
                self.weight = self.loss.weight
        self.keep = self.valid.any(1)
        if not self.keep.any():
            raise ValueError("all labels are ignored")

    def R(self):
        mean = self.loss.reduction == "mean"
        if self.kind == "MSE":
            return 2 / self.f.numel() if mean else 2.0
        if not mean:
            return 1.0
        if self.kind == "BCE":
            return 1 / self.f.numel()
        return 1 / float(self.weight[self.labels[self.valid]].sum())

    def kappa(self):
        """The weight of the true label, (N, K or 1, T)."""
        if self.kind == "MSE":
            return torch.ones_like(self.logits)
        if self.kind == "BCE":
            kappa = torch.ones_like(self.f.detach())
            if self.loss.weight is not None:
                kappa = kappa * self.loss.weight
            if self.loss.pos_weight is not None:
                kappa = kappa * (1 + (self.loss.pos_weight - 1) * self.y)
            return kappa.reshape(self.logits.shape)
        smoothing = self.loss.label_smoothing
        kappa = (1 - smoothing) * self.weight[self.labels] + smoothing * self.weight.mean()
        return (kappa * self.valid).unsqueeze(1)

    def mean(self):
        """The mean of the likelihood, (N, K, T)."""
        if self.kind == "MSE":
            return self.logits
        return self.logits.softmax(1) if self.kind == "CE" else self.logits.sigmoid()

    # Vectors to backpropagate, (V, N, K, T).

    def deltas(self):
        steps = {
            "TypeII": self.type_two,
            "TypeI": self.type_one,
            "MonteCarlo": self.monte_carlo,
            "Empirical": self.empirical,
        }
        return steps[self.flavour]()

    def unit(self):
        return torch.eye(self.logits.shape[1], dtype=self.logits.dtype)[:, None, :, None]

    def root(self):
        """The K columns of the Hessian's root, at all positions."""
        if self.kind == "MSE":
            return self.unit() * torch.ones_like(self.logits)
        p = self.mean()
        if self.kind == "BCE":
            return self.unit() * (p * (1 - p)).sqrt()
        return p.movedim(1, 0).unsqueeze(2).sqrt() * (self.unit() - p)

    def spread(self, columns):
        """From vectors at all positions to T times as many, each at one position."""
        T = columns.shape[-1]
        one = torch.eye(T, dtype=columns.dtype).reshape(1, T, 1, 1, T)
        return (columns.unsqueeze(1) * one).flatten(0, 1)

    def type_two(self):
        return self.spread(self.kappa().sqrt() * self.root())

    def type_one(self):
        p, e = self.mean(), self.unit()
        if self.kind == "CE":
            columns = [p.movedim(1, 0).unsqueeze(2).sqrt() * (p - e)]
        elif self.kind == "MSE":
            columns = [e * torch.ones_like(p) / sqrt(2), -e * torch.ones_like(p) / sqrt(2)]
        else:
            columns = [(1 - p).sqrt() * p * e, p.sqrt() * (p - 1) * e]
        return self.spread(self.kappa().sqrt() * torch.cat(columns))

    def draw(self, M):
        """M draws from the likelihood, (M, N, K, T)."""
        p, generator = self.mean(), self.fisher.generator
        if self.kind == "MSE":
            return p + torch.randn(M, *p.shape, generator=generator, dtype=p.dtype)
        if self.kind == "BCE":
            return torch.bernoulli(p.expand(M, *p.shape), generator=generator)
        return self.hot(self.draw_labels(p, M, generator))

    def draw_labels(self, p, M, generator):
        N, K, T = p.shape
        rows = p.movedim(1, 2).reshape(N * T, K)
        labels = torch.multinomial(rows, M, replacement=True, generator=generator)
        return labels.T.reshape(M, N, T)

    def hot(self, labels):
        """One-hot vectors on axis -2: (..., T) to (..., K, T)."""
        return one_hot(labels, self.logits.shape[1]).movedim(-1, -2).to(self.logits.dtype)

    def monte_carlo(self):
        M = self.fisher.samples
        return self.kappa().sqrt() * (self.mean() - self.draw(M)) / sqrt(M)

    def empirical(self):
        f, loss = self.f.detach().requires_grad_(), copy.copy(self.loss)
        loss.reduction = "sum"
        (gradient,) = torch.autograd.grad(loss(f, self.y), f)
        if self.kind == "MSE":
            gradient = gradient / 2
        return gradient.reshape(1, *self.logits.shape)

    # Backpropagation.

    def sources(self):
        return self.outputs

    def gradients(self, deltas):
        """Pseudo-gradients (V, N, S, D_out) for each layer."""
        sources = self.sources()
        found = {name: [] for name in sources}
        for delta in deltas:
            grads = torch.autograd.grad(
                self.f,
                list(sources.values()),
                delta.reshape(self.f.shape),
                retain_graph=True,
                allow_unused=True,
            )
            for (name, z), g in zip(sources.items(), grads, strict=True):
                g = torch.zeros_like(z) if g is None else g
                found[name].append(g.reshape(len(g), -1, g.shape[-1])[self.keep].double())
        return {name: torch.stack(gs) for name, gs in found.items()}

    # Factors.

    def raw(self, name):
        return self.inputs[name]

    def has_bias(self, name):
        return self.layers[name].bias is not None

    def append(self, x):
        return torch.cat([x, torch.ones_like(x[..., :1])], -1)

    def rows(self, name):
        x = self.raw(name)
        x = x.reshape(len(x), -1, x.shape[-1])[self.keep].double()
        return self.append(x) if self.has_bias(name) else x

    def vectors(self, name):
        return self.g[name]

    def pool_rows(self, x):
        return x.sum(-2, keepdim=True) if self.sharing == "Reduce" else x

    def pool_vectors(self, g):
        return g.sum(-2, keepdim=True) if self.sharing == "Reduce" else g

    def outer(self, x):
        x = x.flatten(0, -2)
        return x.T @ x

    def count(self, N, S):
        return N * S**2 if self.sharing == "Reduce" else N * S

    def A(self, name):
        return self.R() * self.outer(self.pool_rows(self.rows(name)))

    def B(self, name):
        g = self.vectors(name)
        return self.outer(self.pool_vectors(g)) / self.count(*g.shape[1:3])

    def finish(self, name, A, B):
        return A, B

    def result(self, name, A, B):
        return {name: (A, B)}

    # What the faults ask.

    def is_last(self, name):
        return name == self.names[-1]

    def is_first(self, name):
        return name == self.names[0]


def parameter(layer, which):
    return f"{layer}.{which}" if layer else which


class Separate(Recipe):
    """Factors for weight and bias apart."""

    def split(self, name, A, B):
        if not self.has_bias(name):
            return {parameter(name, "weight"): (A, B)}
        return {
            parameter(name, "weight"): (A[:-1, :-1], B),
            parameter(name, "bias"): (A[-1:, -1:], B),
        }

    def result(self, name, A, B):
        return self.split(name, A, B)


class Dense(Recipe):
    """Dense blocks, cvec order."""

    def dense(self, name, A, B):
        return torch.kron(A, B)

    def result(self, name, A, B):
        return {name: self.dense(name, A, B)}


class DenseRvec(Dense):
    def dense(self, name, A, B):
        return torch.kron(B, A)


class DenseSeparate(Separate):
    def result(self, name, A, B):
        return {key: torch.kron(*pair) for key, pair in self.split(name, A, B).items()}


class DenseSeparateRvec(Separate):
    def result(self, name, A, B):
        return {key: torch.kron(b, a) for key, (a, b) in self.split(name, A, B).items()}


@dataclass(frozen=True)
class Wrong:
    """A KFAC with one fault, in words; without, in `RIGHT`."""

    name: str
    fn: Callable
    fault: str
    output: str = "factors"
    order: str = "cvec"
    bias: str = "joint"


def as_function(recipe):
    def fn(model, loss_func, data, fisher, sharing):
        return recipe(model, loss_func, data, fisher, sharing).run()

    return fn


right_kfac = as_function(Recipe)

RIGHT = [
    Wrong("right", right_kfac, ""),
    Wrong("right, separate", as_function(Separate), "", bias="separate"),
    Wrong("right, dense", as_function(Dense), "", "dense"),
    Wrong("right, dense rvec", as_function(DenseRvec), "", "dense", "rvec"),
    Wrong("right, dense separate", as_function(DenseSeparate), "", "dense", "cvec", "separate"),
    Wrong(
        "right, dense separate rvec",
        as_function(DenseSeparateRvec),
        "",
        "dense",
        "rvec",
        "separate",
    ),
]

ZOO = []


def wrong(name, fault, output="factors", order="cvec", bias="joint"):
    def register(recipe):
        ZOO.append(Wrong(name, as_function(recipe), fault, output, order, bias))
        return recipe

    return register


# ---------------------------------------------------------------------------------------------
# Usual suspects: reduction factor.


@wrong("no R", "A lacks the reduction factor R: it is 1 for every loss and reduction.")
class NoR(Recipe):
    def R(self):
        return 1.0


@wrong("R twice", "R stands in A and a second time in B: the block is R times too large.")
class RTwice(Recipe):
    def B(self, name):
        return self.R() * super().B(name)


@wrong("R rooted", "A is multiplied by the square root of R instead of R.")
class RRooted(Recipe):
    def R(self):
        return sqrt(super().R())


@wrong("always mean", "The reduction of the loss is ignored: a sum loss gets the R of the mean.")
class AlwaysMean(Recipe):
    def R(self):
        loss, self.loss = self.loss, copy.copy(self.loss)
        self.loss.reduction = "mean"
        R = super().R()
        self.loss = loss
        return R


@wrong("MSE mean over data only", "MSE, mean: R = 2/N instead of 2/(N · dim y).")
class MSEMeanOverDataOnly(Recipe):
    def R(self):
        R = super().R()
        mean_mse = self.kind == "MSE" and self.loss.reduction == "mean"
        return 2 / len(self.f) if mean_mse else R


@wrong("MSE without 2", "MSE: the factor 2 in R is missing for both reductions (block halved).")
class MSEWithout2(Recipe):
    def R(self):
        return super().R() / (2 if self.kind == "MSE" else 1)


@wrong("MSE sum without 2", "MSE, sum only: R = 1 instead of 2.")
class MSESumWithout2(Recipe):
    def R(self):
        sum_mse = self.kind == "MSE" and self.loss.reduction == "sum"
        return 1.0 if sum_mse else super().R()


@wrong("CE mean over data only", "CE, mean: R = 1/N, the T positions are not counted.")
class CEMeanOverDataOnly(Recipe):
    def R(self):
        mean_ce = self.kind == "CE" and self.loss.reduction == "mean"
        return 1 / len(self.f) if mean_ce else super().R()


@wrong("CE mean over entries", "CE, mean: R = 1/(N · K · T), also divided by the K classes.")
class CEMeanOverEntries(Recipe):
    def R(self):
        mean_ce = self.kind == "CE" and self.loss.reduction == "mean"
        return 1 / self.f.numel() if mean_ce else super().R()


@wrong("BCE mean over data only", "BCE, mean: R = 1/N instead of 1/(N · dim y).")
class BCEMeanOverDataOnly(Recipe):
    def R(self):
        mean_bce = self.kind == "BCE" and self.loss.reduction == "mean"
        return 1 / len(self.f) if mean_bce else super().R()


@wrong("type-II on the mean loss", "Type-II only: the root is that of the Hessian of R·c: B has R.")
class TypeIIOnTheMeanLoss(Recipe):
    def type_two(self):
        return sqrt(self.R()) * super().type_two()


@wrong("MSE 2 in root and R", "MSE, type-II: columns √2 e_k on top of the 2 in R: block doubled.")
class MSE2InRootAndR(Recipe):
    def type_two(self):
        return super().type_two() * (sqrt(2) if self.kind == "MSE" else 1)


@wrong(
    "labels counted although ignored",
    "CE, mean, ignore_index: R = 1/(N · T) counts the ignored labels.",
)
class LabelsCountedAlthoughIgnored(Recipe):
    def R(self):
        mean_ce = self.kind == "CE" and self.loss.reduction == "mean"
        return super().R() * (float(self.valid.double().mean()) if mean_ce else 1)


@wrong("weight not rooted", "CE with class weights: Δ holds κ instead of √κ in type-II.")
class WeightNotRooted(Recipe):
    def type_two(self):
        return super().type_two() * self.kappa().sqrt()


# Usual suspects: counts of data and positions.


@wrong("B summed over data", "B is not divided by N: the block is N times too large.")
class BSummedOverData(Recipe):
    def count(self, N, S):
        return super().count(N, S) / N


@wrong("N in both factors", "A is divided by N as well as B: the block is N times too small.")
class NInBothFactors(Recipe):
    def A(self, name):
        return super().A(name) / len(self.f)


@wrong("expand B without S", "Expand: B is divided by N but not by S.")
class ExpandBWithoutS(Recipe):
    def count(self, N, S):
        return N if self.sharing == "Expand" else super().count(N, S)


@wrong("expand A with S", "Expand: A is averaged over S as well (1/S in both factors).")
class ExpandAWithS(Recipe):
    def A(self, name):
        S = self.rows(name).shape[1]
        return super().A(name) / (S if self.sharing == "Expand" else 1)


@wrong("reduce B over S", "Reduce: B is divided by N S instead of N S².")
class ReduceBOverS(Recipe):
    def count(self, N, S):
        return N * S


@wrong("reduce B without S", "Reduce: B is divided by N alone.")
class ReduceBWithoutS(Recipe):
    def count(self, N, S):
        return N if self.sharing == "Reduce" else super().count(N, S)


@wrong("reduce A averaged", "Reduce: A is of the mean over S of x̃, not of the sum; B keeps 1/S².")
class ReduceAAveraged(Recipe):
    def pool_rows(self, x):
        return x.mean(-2, keepdim=True) if self.sharing == "Reduce" else x


@wrong("reduce B averaged twice", "Reduce: B is of the mean over S of g and divided by S² again.")
class ReduceBAveragedTwice(Recipe):
    def pool_vectors(self, g):
        return g.mean(-2, keepdim=True) if self.sharing == "Reduce" else g


@wrong("reduce N and S swapped", "Reduce: B is divided by N² S instead of N S².")
class ReduceNAndSSwapped(Recipe):
    def count(self, N, S):
        return super().count(S, N)


@wrong("T for S", "B is divided by the positions of the prediction, T, in place of the layer's S.")
class TForS(Recipe):
    def count(self, N, S):
        return super().count(N, self.logits.shape[2])


@wrong("B over all labels", "CE only: B is divided by N·T labels instead of N data (times S).")
class BOverAllLabels(Recipe):
    def count(self, N, S):
        return super().count(N, S) * (self.logits.shape[2] if self.kind == "CE" else 1)


# Usual suspects: which axis, and when to square.


@wrong("sharings swapped", "Expand does reduce and reduce does expand, in A and B.")
class SharingsSwapped(Recipe):
    def check(self):
        super().check()
        self.sharing = {"Expand": "Reduce", "Reduce": "Expand"}[self.sharing]


@wrong("reduce A as expand", "Reduce: A is the sum over s of x̃ x̃ᵀ, B is right.")
class ReduceAAsExpand(Recipe):
    def pool_rows(self, x):
        return x


@wrong("reduce B squares first", "Reduce: B sums g gᵀ over s instead of squaring the sum.")
class ReduceBSquaresFirst(Recipe):
    def pool_vectors(self, g):
        return g


@wrong("expand A averaged first", "Expand: A is S times the outer product of the mean over s.")
class ExpandAAveragedFirst(Recipe):
    def pool_rows(self, x):
        if self.sharing == "Reduce":
            return super().pool_rows(x)
        return x.mean(-2, keepdim=True) * sqrt(x.shape[-2])


@wrong("rows summed over data", "A is 1/N times the outer product of the sum of x̃ over data.")
class RowsSummedOverData(Recipe):
    def pool_rows(self, x):
        return super().pool_rows(x).sum(0, keepdim=True) / sqrt(len(x))


@wrong("gradients averaged over data", "B squares the mean of g over data: (1/N Σ g)(1/N Σ g)ᵀ.")
class GradientsAveragedOverData(Recipe):
    def pool_vectors(self, g):
        return super().pool_vectors(g).mean(1, keepdim=True) * sqrt(g.shape[1])


@wrong("vectors summed before squaring", "Type-II: the V vectors are summed into one before.")
class VectorsSummedBeforeSquaring(Recipe):
    def type_two(self):
        return super().type_two().sum(0, keepdim=True)


@wrong("samples averaged before squaring", "MC: gradients are averaged over M, then squared.")
class SamplesAveragedBeforeSquaring(Recipe):
    def monte_carlo(self):
        return super().monte_carlo().sum(0, keepdim=True) / sqrt(self.fisher.samples)


@wrong("MC without 1/M", "MC: the M samples are summed, 1/M is missing.")
class MCWithoutOneOverM(Recipe):
    def monte_carlo(self):
        return super().monte_carlo() * sqrt(self.fisher.samples)


@wrong("MC with 1/M²", "MC: Δ has 1/M instead of 1/√M.")
class MCWithOneOverMSquared(Recipe):
    def monte_carlo(self):
        return super().monte_carlo() / sqrt(self.fisher.samples)


@wrong("type-II averaged over classes", "Type-II: B is the mean over the V vectors, not the sum.")
class TypeIIAveragedOverClasses(Recipe):
    def type_two(self):
        deltas = super().type_two()
        return deltas / sqrt(len(deltas))


@wrong("all positions at once", "Type-II: K vectors filled at all positions, not T·K at one each.")
class AllPositionsAtOnce(Recipe):
    def type_two(self):
        return self.kappa().sqrt() * self.root()


@wrong("empirical per position", "Empirical: the gradient is split into T vectors, one a position.")
class EmpiricalPerPosition(Recipe):
    def empirical(self):
        return self.spread(super().empirical())


@wrong(
    "data and positions interleaved",
    "Rows (N, S, D) are read from memory as if they were (S, N, D): sums over s mix data.",
)
class DataAndPositionsInterleaved(Recipe):
    def pool_rows(self, x):
        N, S, D = x.shape
        return super().pool_rows(x.reshape(S, N, D).transpose(0, 1))


@wrong("softmax over data", "CE: the softmax runs over axis 0, the batch, instead of the classes.")
class SoftmaxOverData(Recipe):
    def mean(self):
        return self.logits.softmax(0) if self.kind == "CE" else super().mean()


@wrong("softmax over the last axis", "CE with positions: softmax(-1), so over T, not over K.")
class SoftmaxOverTheLastAxis(Recipe):
    def mean(self):
        if self.kind == "CE" and self.f.ndim > 2:
            return self.f.detach().softmax(-1).reshape(self.logits.shape)
        return super().mean()


@wrong("double softmax", "CE: softmax is applied to probabilities, softmax(softmax(f)).")
class DoubleSoftmax(Recipe):
    def mean(self):
        return super().mean().softmax(1) if self.kind == "CE" else super().mean()


@wrong("double sigmoid", "BCE: the sigmoid is applied twice in type-II and MC.")
class DoubleSigmoid(Recipe):
    def mean(self):
        return super().mean().sigmoid() if self.kind == "BCE" else super().mean()


@wrong("softmax for BCE", "BCE: probabilities are the softmax over entries, not sigmoids.")
class SoftmaxForBCE(Recipe):
    def mean(self):
        return self.logits.softmax(1) if self.kind == "BCE" else super().mean()


# Usual suspects: which vectors.


@wrong("CE Hessian for its root", "CE, type-II: columns of diag p − p pᵀ are backpropagated.")
class CEHessianForItsRoot(Recipe):
    def root(self):
        if self.kind != "CE":
            return super().root()
        p = self.mean()
        return p.movedim(1, 0).unsqueeze(2) * (self.unit() - p)


@wrong("CE root transposed", "CE, type-II: rows of L = diag √p − p √pᵀ in place of columns.")
class CERootTransposed(Recipe):
    def root(self):
        root = super().root()
        return root.transpose(0, 2) if self.kind == "CE" else root


@wrong("CE root with √p √pᵀ", "CE, type-II: L = diag √p − √p √pᵀ, with a root too many.")
class CERootWithRootpRootpT(Recipe):
    def root(self):
        if self.kind != "CE":
            return super().root()
        q = self.mean().sqrt()
        return q.movedim(1, 0).unsqueeze(2) * (self.unit() - q)


@wrong("CE as independent classes", "CE, type-II: diag √(p(1−p)), off-diagonals of H forgotten.")
class CEAsIndependentClasses(Recipe):
    def root(self):
        if self.kind != "CE":
            return super().root()
        p = self.mean()
        return self.unit() * (p * (1 - p)).sqrt()


@wrong("BCE without root", "BCE, type-II: Δ is σ(1−σ) e_k, the square root is missing.")
class BCEWithoutRoot(Recipe):
    def root(self):
        return super().root() ** 2 if self.kind == "BCE" else super().root()


@wrong("BCE as MSE", "BCE, type-II: the root of MSE is used, e_k in place of √(σ(1−σ)) e_k.")
class BCEAsMSE(Recipe):
    def root(self):
        return self.unit() * torch.ones_like(self.logits) if self.kind == "BCE" else super().root()


@wrong("MC with true labels", "MC: the given targets stand where sampled ones should.")
class MCWithTrueLabels(Recipe):
    def draw(self, M):
        drawn = super().draw(M)
        if self.kind == "CE":
            return self.hot(self.labels).expand_as(drawn)
        return self.y.reshape(self.logits.shape).expand_as(drawn)


@wrong(
    "empirical with sampled labels", "Empirical: the labels are sampled, so it is MC with M = 1."
)
class EmpiricalWithSampledLabels(Recipe):
    def empirical(self):
        p = self.mean()
        if self.kind == "MSE":
            return torch.randn(1, *p.shape, dtype=p.dtype)
        if self.kind == "BCE":
            return p - torch.bernoulli(p).unsqueeze(0)
        return self.kappa().sqrt() * (p - self.hot(self.draw_labels(p, 1, None)))


@wrong("MC with the argmax", "MC, CE: the most likely label stands in place of a sampled one.")
class MCWithTheArgmax(Recipe):
    def draw_labels(self, p, M, generator):
        return p.argmax(1).expand(M, -1, -1)


@wrong("MC with uniform labels", "MC, CE: labels are drawn uniformly, not from the softmax.")
class MCWithUniformLabels(Recipe):
    def draw_labels(self, p, M, generator):
        return super().draw_labels(torch.ones_like(p), M, generator)


@wrong("MC without detach", "MC, MSE: the drawn target moves with f, its gradient is zero: B = 0.")
class MCWithoutDetach(Recipe):
    def draw(self, M):
        drawn = super().draw(M)
        return self.mean().expand_as(drawn) if self.kind == "MSE" else drawn


@wrong("MC variance one half", "MC, MSE: targets are drawn with variance 1/2, for exp(−‖f−y‖²).")
class MCVarianceOneHalf(Recipe):
    def draw(self, M):
        drawn, f = super().draw(M), self.mean()
        return f + (drawn - f) / sqrt(2) if self.kind == "MSE" else drawn


@wrong("MC gradient of the MSE", "MC, MSE: Δ is 2(f − ỹ), while R has a 2 already: B times 4.")
class MCGradientOfTheMSE(Recipe):
    def monte_carlo(self):
        return super().monte_carlo() * (2 if self.kind == "MSE" else 1)


@wrong("empirical gradient of the MSE", "Empirical, MSE: Δ is 2(f − y): B is 4 times too large.")
class EmpiricalGradientOfTheMSE(Recipe):
    def empirical(self):
        return super().empirical() * (2 if self.kind == "MSE" else 1)


@wrong(
    "empirical gradient of the mean loss",
    "Empirical: the gradient of the reduced loss is backpropagated, R times ∇c: B has R².",
)
class EmpiricalGradientOfTheMeanLoss(Recipe):
    def empirical(self):
        return super().empirical() * self.R()


@wrong("empirical over T", "Empirical, mean: each datum's loss is averaged over T, so Δ has 1/T.")
class EmpiricalOverT(Recipe):
    def empirical(self):
        T = self.logits.shape[2]
        return super().empirical() / (T if self.loss.reduction == "mean" else 1)


@wrong("one coin for all entries", "MC, BCE: one uniform number decides all entries of a datum.")
class OneCoinForAllEntries(Recipe):
    def draw(self, M):
        if self.kind != "BCE":
            return super().draw(M)
        p = self.mean()
        u = torch.rand(M, len(p), 1, 1, generator=self.fisher.generator, dtype=p.dtype)
        return (u < p).to(p.dtype)


@wrong("one noise for all positions", "MC, MSE: the noise of position 0 is used at every position.")
class OneNoiseForAllPositions(Recipe):
    def draw(self, M):
        drawn, f = super().draw(M), self.mean()
        return f + (drawn - f)[..., :1] if self.kind == "MSE" else drawn


@wrong("one label for all positions", "MC, CE: the label drawn at position 0 is used at all.")
class OneLabelForAllPositions(Recipe):
    def draw_labels(self, p, M, generator):
        labels = super().draw_labels(p, M, generator)
        return labels[..., :1].expand_as(labels)


@wrong("sampled label picks the weight", "MC, CE with class weights: κ is that of the drawn label.")
class SampledLabelPicksTheWeight(Recipe):
    def monte_carlo(self):
        if self.kind != "CE" or self.loss.weight is None:
            return super().monte_carlo()
        M, drawn = self.fisher.samples, self.draw(self.fisher.samples)
        kappa = torch.einsum("k,mnkt->mnt", self.weight, drawn) * self.valid
        return kappa.unsqueeze(2).sqrt() * (self.mean() - drawn) / sqrt(M)


@wrong("flavour ignored", "Empirical silently computes type-II.")
class FlavourIgnored(Recipe):
    def empirical(self):
        return self.type_two()


# Usual suspects: bias, order, hooks, dtype.


@wrong("no 1 appended", "A has no row and column for the bias (shape D_in, not D_in + 1).")
class No1Appended(Recipe):
    def append(self, x):
        return x


@wrong("1 at the front", "The 1 for the bias stands at the front of x̃, not at the end.")
class OneAtTheFront(Recipe):
    def append(self, x):
        return super().append(x).roll(1, -1)


@wrong("0 appended", "A zero is appended for the bias in place of a one.")
class ZeroAppended(Recipe):
    def append(self, x):
        return torch.cat([x, torch.zeros_like(x[..., :1])], -1)


@wrong("reduce bias after the sum", "Reduce: the 1 is appended after the sum over s, [Σ x; 1].")
class ReduceBiasAfterTheSum(Recipe):
    def append(self, x):
        x = super().append(x)
        if self.sharing == "Reduce":
            x[..., -1] /= x.shape[-2]
        return x


@wrong("1 without a bias", "Layers without bias get a column of ones all the same (wrong shape).")
class OneWithoutABias(Recipe):
    def has_bias(self, name):
        return True


@wrong("factors swapped", "The pair is returned as (B, A).")
class FactorsSwapped(Recipe):
    def finish(self, name, A, B):
        return B, A


@wrong("output for input", "The hook reads the layer's output as its input: A is of z.")
class OutputForInput(Recipe):
    def raw(self, name):
        return self.outputs[name].detach()


@wrong("float32", "Inputs are rounded to float32 before A is computed.")
class Float32(Recipe):
    def raw(self, name):
        return super().raw(name).float()


@wrong("gradients pile up", "Gradients are not cleared between vectors: g_v is Σ_{u ≤ v} g_u.")
class GradientsPileUp(Recipe):
    def vectors(self, name):
        return super().vectors(name).cumsum(0)


@wrong("last vector only", "The backward hook overwrites: only the last vector's g is in B.")
class LastVectorOnly(Recipe):
    def vectors(self, name):
        return super().vectors(name)[-1:]


@wrong("hook fires twice", "The hook also counts a second forward pass: A is doubled.")
class HookFiresTwice(Recipe):
    def outer(self, x):
        return super().outer(x) * (2 if x.ndim == 3 else 1)


@wrong(
    "twice, last call kept",
    "A layer that is called twice keeps the input and gradient of its last call only.",
)
class TwiceLastCallKept(Recipe):
    def remember(self, name, x, z):
        self.inputs.pop(name, None)
        return super().remember(name, x, z)


@wrong(
    "in-place activation",
    "The stored output is overwritten by an in-place activation: g is taken after it.",
)
class InPlaceActivation(Recipe):
    def remember(self, name, x, z):
        super().remember(name, x, z)
        return self.outputs[name]


@wrong("last layer without R", "R is missing in the last layer only.")
class LastLayerWithoutR(Recipe):
    def A(self, name):
        return super().A(name) / (self.R() if self.is_last(name) else 1)


@wrong("mean losses without N", "For mean losses B is a sum over data; for sum losses it is right.")
class MeanLossesWithoutN(Recipe):
    def count(self, N, S):
        return super().count(N, S) / (N if self.loss.reduction == "mean" else 1)


@wrong(
    "unequal batches averaged",
    "The batch is cut after datum 0 and the two means of g gᵀ are averaged with equal weights.",
)
class UnequalBatchesAveraged(Recipe):
    def pool_vectors(self, g):
        g, N = super().pool_vectors(g), g.shape[1]
        if N < 2:
            return g
        weights = torch.full((N,), N / 2 / (N - 1), dtype=g.dtype)
        weights[0] = N / 2
        return g * weights.sqrt()[None, :, None, None]


# Usual suspects: dense blocks, orders, weight and bias apart.


@wrong("dense kron(B, A) as cvec", "kron(B, A) is called cvec order.", "dense")
class DenseKronBAAsCvec(DenseRvec):
    pass


@wrong("dense kron(A, B) as rvec", "kron(A, B) is called rvec order.", "dense", "rvec")
class DenseKronABAsRvec(Dense):
    pass


@wrong(
    "dense bias last in rvec",
    "rvec order, but the bias entries stand at the end of the whole vector: [rvec W; b].",
    "dense",
    "rvec",
)
class DenseBiasLastInRvec(DenseRvec):
    def dense(self, name, A, B):
        index = torch.arange(len(A) * len(B)).reshape(len(B), len(A))
        if self.has_bias(name):
            index = torch.cat([index[:, :-1].flatten(), index[:, -1]])
        index = index.flatten()
        return super().dense(name, A, B)[index][:, index]


@wrong("dense bias first", "cvec order of [b W]: the bias column stands in front.", "dense")
class DenseBiasFirst(Dense):
    def dense(self, name, A, B):
        shift = 1 if self.has_bias(name) else 0
        return torch.kron(A.roll((shift, shift), (0, 1)), B)


@wrong(
    "dense half reordered", "Rows are in rvec order, columns still in cvec order.", "dense", "rvec"
)
class DenseHalfReordered(Dense):
    def dense(self, name, A, B):
        index = torch.arange(len(A) * len(B)).reshape(len(A), len(B)).T.flatten()
        return super().dense(name, A, B)[index]


@wrong(
    "dense reshaped without a permutation",
    "The outer product A_ij B_kl is reshaped from (i, j, k, l), not from (i, k, j, l).",
    "dense",
)
class DenseReshapedWithoutAPermutation(Dense):
    def dense(self, name, A, B):
        D = len(A) * len(B)
        return torch.einsum("ij,kl->ijkl", A, B).reshape(D, D)


@wrong(
    "dense inverse permutation",
    "From cvec to rvec with the inverse permutation (right only where its square is 1).",
    "dense",
    "rvec",
)
class DenseInversePermutation(Dense):
    def dense(self, name, A, B):
        index = torch.arange(len(A) * len(B)).reshape(len(B), len(A)).T.flatten()
        return super().dense(name, A, B)[index][:, index]


@wrong(
    "dense without coupling",
    "The block is joint, but the weight-bias coupling in it is set to zero.",
    "dense",
)
class DenseWithoutCoupling(Dense):
    def dense(self, name, A, B):
        if self.has_bias(name):
            A = A.clone()
            A[-1, :-1] = A[:-1, -1] = 0
        return super().dense(name, A, B)


@wrong(
    "dense separate, bias of one datum",
    "The bias block is B alone: A_b = 1 in place of R N S (expand) or R N S² (reduce).",
    "dense",
    "rvec",
    "separate",
)
class DenseSeparateBiasOfOneDatum(DenseSeparateRvec):
    def finish(self, name, A, B):
        if self.has_bias(name):
            A = A.clone()
            A[-1, -1] = 1
        return A, B


@wrong(
    "dense separate kron(B, A) as cvec",
    "Weight block in rvec order but called cvec; the bias block is right.",
    "dense",
    "cvec",
    "separate",
)
class DenseSeparateKronBAAsCvec(DenseSeparateRvec):
    pass


@wrong(
    "separate bias without S",
    "Bias: A_b = R N whatever the sharing, S (expand) or S² (reduce) is missing.",
    bias="separate",
)
class SeparateBiasWithoutS(Separate):
    def finish(self, name, A, B):
        S = self.rows(name).shape[1]
        if self.has_bias(name):
            A = A.clone()
            A[-1, -1] /= S if self.sharing == "Expand" else S**2
        return A, B


@wrong(
    "separate reduce bias as expand",
    "Reduce, bias: A_b = R N S in place of R N S².",
    bias="separate",
)
class SeparateReduceBiasAsExpand(Separate):
    def finish(self, name, A, B):
        if self.has_bias(name) and self.sharing == "Reduce":
            A = A.clone()
            A[-1, -1] /= self.rows(name).shape[1]
        return A, B


# ---------------------------------------------------------------------------------------------
# Unusual ones.


@wrong("damped A", "0.01 times the identity is left in A.")
class DampedA(Recipe):
    def finish(self, name, A, B):
        return A + 0.01 * torch.eye(len(A), dtype=A.dtype), B


@wrong("damped B in the last layer", "0.001 times the identity is left in the last layer's B.")
class DampedBInTheLastLayer(Recipe):
    def finish(self, name, A, B):
        return A, B + self.is_last(name) * 1e-3 * torch.eye(len(B), dtype=B.dtype)


@wrong("diagonal A", "The off-diagonal entries of A are dropped.")
class DiagonalA(Recipe):
    def finish(self, name, A, B):
        return A.diag().diag(), B


@wrong("diagonal B", "The off-diagonal entries of B are dropped.")
class DiagonalB(Recipe):
    def finish(self, name, A, B):
        return A, B.diag().diag()


@wrong("centered inputs", "The mean of x over data and positions is subtracted (the 1 stays).")
class CenteredInputs(Recipe):
    def append(self, x):
        return super().append(x - x.mean((0, 1)))


@wrong("centered gradients", "B is a covariance: the mean of g over data is subtracted, if N > 1.")
class CenteredGradients(Recipe):
    def vectors(self, name):
        g = super().vectors(name)
        return g - g.mean(1, keepdim=True) if g.shape[1] > 1 else g


@wrong(
    "pre-activation as input",
    "A of a layer is of the previous layer's output before the activation, where shapes agree.",
)
class PreActivationAsInput(Recipe):
    def raw(self, name):
        before = self.names[max(self.names.index(name) - 1, 0)]
        z = self.outputs[before].detach()
        fits = before != name and z.shape == self.inputs[name].shape
        return z if fits else super().raw(name)


@wrong(
    "activation not differentiated",
    "g is the gradient by the activation's output: its derivative is missing in B.",
)
class ActivationNotDifferentiated(Recipe):
    def sources(self):
        sources = dict(self.outputs)
        for name, after in zip(self.names, self.names[1:], strict=False):
            if self.graph_inputs[after].shape == sources[name].shape:
                sources[name] = self.graph_inputs[after]
        return sources


@wrong("next layer's A", "Each layer but the last has A of the next layer, where shapes agree.")
class NextLayersA(Recipe):
    def raw(self, name):
        after = self.names[min(self.names.index(name) + 1, len(self.names) - 1)]
        fits = self.inputs[after].shape == self.inputs[name].shape
        return self.inputs[after if fits else name]


@wrong("last datum dropped in A", "The last datum is missing in A, if N > 1 (R is unchanged).")
class LastDatumDroppedInA(Recipe):
    def rows(self, name):
        x = super().rows(name)
        return x[:-1] if len(x) > 1 else x


@wrong("B of the first datum", "B is that of datum 0 alone, not the average over data.")
class BOfTheFirstDatum(Recipe):
    def vectors(self, name):
        return super().vectors(name)[:, :1]


@wrong("EMA from the identity", "A = 0.95 A + 0.05 I: a moving average half-way from its start.")
class EMAFromTheIdentity(Recipe):
    def finish(self, name, A, B):
        return 0.95 * A + 0.05 * torch.eye(len(A), dtype=A.dtype), B


@wrong("EMA without correction", "B is 0.1 times B: a moving average from zero after one step.")
class EMAWithoutCorrection(Recipe):
    def finish(self, name, A, B):
        return A, 0.1 * B


@wrong("diagonal doubled", "A is symmetrized as triu(A) + triu(A)ᵀ, which doubles its diagonal.")
class DiagonalDoubled(Recipe):
    def finish(self, name, A, B):
        return A.triu() + A.triu().T, B


@wrong("B tril only", "Only the lower triangle of B is filled.")
class BTrilOnly(Recipe):
    def finish(self, name, A, B):
        return A, B.tril()


@wrong("gradients clipped", "Each g longer than 0.3 is clipped to that length.")
class GradientsClipped(Recipe):
    def pool_vectors(self, g):
        g = super().pool_vectors(g)
        return g * (0.3 / g.norm(dim=-1, keepdim=True).clamp(min=1e-30)).clamp(max=1)


@wrong("1.1", "B is 1.1 times too large, everywhere.")
class TenPercentMore(Recipe):
    def finish(self, name, A, B):
        return A, 1.1 * B


@wrong("1.001 for sum losses", "A is 1.001 times too large for sum losses.")
class SlightlyMoreForSumLosses(Recipe):
    def finish(self, name, A, B):
        return A * (1.001 if self.loss.reduction == "sum" else 1), B


@wrong("N + 1", "B is divided by N + 1 in place of N.")
class NPlusOne(Recipe):
    def count(self, N, S):
        return super().count(N + 1, S)


@wrong("N − 1", "B is divided by N − 1 in place of N, where N > 1.")
class NMinusOne(Recipe):
    def count(self, N, S):
        return super().count(max(N - 1, 1), S)


@wrong("traces normalised", "Both factors are divided by their traces.")
class TracesNormalised(Recipe):
    def finish(self, name, A, B):
        return A / A.trace(), B / B.trace().clamp(min=1e-30)


@wrong("temperature", "CE: the softmax has temperature 2, also where labels are sampled.")
class Temperature(Recipe):
    def mean(self):
        return (self.logits / 2).softmax(1) if self.kind == "CE" else super().mean()


@wrong("temperature where sampled", "MC, CE: labels are drawn at temperature 1/2, p is right in Δ.")
class TemperatureWhereSampled(Recipe):
    def draw_labels(self, p, M, generator):
        return super().draw_labels((2 * self.logits).softmax(1), M, generator)


@wrong("factors rooted", "A and B are replaced by their matrix square roots.")
class FactorsRooted(Recipe):
    def finish(self, name, A, B):
        return rooted(A), rooted(B)


def rooted(A):
    values, Q = torch.linalg.eigh(A)
    return Q * values.clamp(min=0).sqrt() @ Q.T


@wrong("absolute gradients", "B is of |g|: the signs of its entries are lost.")
class AbsoluteGradients(Recipe):
    def pool_vectors(self, g):
        return super().pool_vectors(g).abs()


@wrong("rows of unit length", "Each x is divided by its length before the 1 is appended.")
class RowsOfUnitLength(Recipe):
    def raw(self, name):
        x = super().raw(name)
        return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-30)


@wrong("A of rank one", "A is truncated to its largest eigenvalue (no loss for one row).")
class AOfRankOne(Recipe):
    def finish(self, name, A, B):
        values, Q = torch.linalg.eigh(A)
        return values[-1] * torch.outer(Q[:, -1], Q[:, -1]), B


@wrong("A eigenvalues floored", "Eigenvalues of A below 1 % of the largest are raised to that.")
class AEigenvaluesFloored(Recipe):
    def finish(self, name, A, B):
        values, Q = torch.linalg.eigh(A)
        return Q * values.clamp(min=float(values[-1]) / 100) @ Q.T, B


@wrong("last class dropped", "Type-II: the last of the K columns is not backpropagated, if K > 1.")
class LastClassDropped(Recipe):
    def root(self):
        root = super().root()
        return root[:-1] if len(root) > 1 else root


@wrong("column of the label only", "CE, type-II: only the column of the true label is used.")
class ColumnOfTheLabelOnly(Recipe):
    def root(self):
        root = super().root()
        if self.kind != "CE":
            return root
        return root * self.hot(self.labels).movedim(1, 0).unsqueeze(2)


@wrong("probabilities clamped", "CE and BCE: probabilities are clamped to [0.3, 0.7].")
class ProbabilitiesClamped(Recipe):
    def mean(self):
        return super().mean().clamp(0.3, 0.7) if self.kind != "MSE" else super().mean()


@wrong("B in bfloat16", "B is stored in bfloat16 in between: three decimal digits.")
class BInBfloat16(Recipe):
    def finish(self, name, A, B):
        return A, B.to(torch.bfloat16).double()


@wrong("first position only", "A takes S times position 0, like a class token (S = 1 is right).")
class FirstPositionOnly(Recipe):
    def rows(self, name):
        x = super().rows(name)
        return x[:, :1].expand_as(x)


@wrong("labels of the neighbour", "Empirical: targets are shifted by one datum against inputs.")
class LabelsOfTheNeighbour(Recipe):
    def empirical(self):
        self.y = self.y.roll(1, 0)
        return super().empirical()


@wrong("neighbours multiplied", "A is Σ x̃_n x̃_{n+1}ᵀ, symmetrized: the data are shifted by one.")
class NeighboursMultiplied(Recipe):
    def A(self, name):
        x = self.pool_rows(self.rows(name))
        A = self.R() * x.flatten(0, 1).T @ x.roll(1, 0).flatten(0, 1)
        return (A + A.T) / 2


@wrong("old data fade", "B weighs datum n with 0.9^(N−1−n).")
class OldDataFade(Recipe):
    def vectors(self, name):
        g = super().vectors(name)
        fade = 0.9 ** torch.arange(g.shape[1] - 1, -1, -1, dtype=g.dtype)
        return g * fade.sqrt()[None, :, None, None]


@wrong("without replacement", "MC, CE: the M ≤ K labels of a datum are drawn without replacement.")
class WithoutReplacement(Recipe):
    def draw_labels(self, p, M, generator):
        N, K, T = p.shape
        if M > K:
            return super().draw_labels(p, M, generator)
        rows = p.movedim(1, 2).reshape(N * T, K)
        labels = torch.multinomial(rows, M, replacement=False, generator=generator)
        return labels.T.reshape(M, N, T)


@wrong("uniform noise", "MC, MSE: noise is uniform in [−1, 1], of variance 1/3 in place of 1.")
class UniformNoise(Recipe):
    def draw(self, M):
        if self.kind != "MSE":
            return super().draw(M)
        f = self.mean()
        u = torch.rand(M, *f.shape, generator=self.fisher.generator, dtype=f.dtype)
        return f + 2 * u - 1


@wrong("gradient times output", "B is of g ⊙ z in place of g.")
class GradientTimesOutput(Recipe):
    def vectors(self, name):
        z = self.outputs[name].detach()
        z = z.reshape(len(z), -1, z.shape[-1])[self.keep].double()
        return super().vectors(name) * z


@wrong("deep layers louder", "B of the i-th layer from the input is (1 + i/10) times too large.")
class DeepLayersLouder(Recipe):
    def finish(self, name, A, B):
        return A, B * (1 + self.names.index(name) / 10)


@wrong("B of the layer above", "Each layer but the last has B of the next one, where shapes agree.")
class BOfTheLayerAbove(Recipe):
    def vectors(self, name):
        after = self.names[min(self.names.index(name) + 1, len(self.names) - 1)]
        fits = self.g[after].shape == self.g[name].shape
        return self.g[after if fits else name]


@wrong("balanced one way", "A is multiplied by π, π² = mean(diag B) / mean(diag A); B is not.")
class BalancedOneWay(Recipe):
    def finish(self, name, A, B):
        return A * (B.diag().mean() / A.diag().mean()).sqrt(), B


@wrong("outliers skipped", "Data whose g is longer than 1.05 times the median are left out of B.")
class OutliersSkipped(Recipe):
    def vectors(self, name):
        g = super().vectors(name)
        length = torch.linalg.vector_norm(g, dim=(0, 2, 3))
        return g * (length <= 1.05 * length.median())[None, :, None, None]


@wrong("corner of A", "The bias entry of A, bottom right, is doubled.")
class CornerOfA(Recipe):
    def finish(self, name, A, B):
        if self.has_bias(name):
            A = A.clone()
            A[-1, -1] *= 2
        return A, B


@wrong(
    "bias coupling negated", "The weight-bias entries of A have the wrong sign in the first layer."
)
class BiasCouplingNegated(Recipe):
    def finish(self, name, A, B):
        if self.has_bias(name) and self.is_first(name):
            A = A.clone()
            A[-1, :-1] *= -1
            A[:-1, -1] *= -1
        return A, B


@wrong("weights squared into g", "The last layer's g is replaced by W Wᵀ g / ‖W Wᵀ‖.")
class WeightsSquaredIntoG(Recipe):
    def vectors(self, name):
        g = super().vectors(name)
        if not self.is_last(name):
            return g
        W = self.layers[name].weight.detach().double()
        return g @ (W @ W.T) / (W @ W.T).norm()


@wrong("N even", "B is not divided by N where N is even; it is right where N is odd.")
class NEven(Recipe):
    def count(self, N, S):
        return super().count(N, S) / (N if N % 2 == 0 else 1)


@wrong("dense Kronecker sum", "A ⊗ I + I ⊗ B stands in place of A ⊗ B.", "dense")
class DenseKroneckerSum(Dense):
    def dense(self, name, A, B):
        eye_A, eye_B = (torch.eye(len(C), dtype=C.dtype) for C in (A, B))
        return torch.kron(A, eye_B) + torch.kron(eye_A, B)


@wrong("dense diagonal", "Only the diagonal of A ⊗ B is kept.", "dense")
class DenseDiagonal(Dense):
    def dense(self, name, A, B):
        return super().dense(name, A, B).diag().diag()


@wrong("dense damped", "1e-4 times the identity is left in B ⊗ A.", "dense", "rvec")
class DenseDamped(DenseRvec):
    def dense(self, name, A, B):
        block = super().dense(name, A, B)
        return block + 1e-4 * torch.eye(len(block), dtype=block.dtype)


@wrong(
    "dense factors damped",
    "(A + 0.01 I) ⊗ (B + 0.01 I): factored damping is left in the block.",
    "dense",
)
class DenseFactorsDamped(Dense):
    def dense(self, name, A, B):
        A, B = (C + 0.01 * torch.eye(len(C), dtype=C.dtype) for C in (A, B))
        return super().dense(name, A, B)


@wrong(
    "separate bias eliminated",
    "Weight: A is the Schur complement A_W − a aᵀ/A_b, as if the bias were optimised away.",
    bias="separate",
)
class SeparateBiasEliminated(Separate):
    def finish(self, name, A, B):
        if self.has_bias(name):
            A = A.clone()
            A[:-1, :-1] -= torch.outer(A[:-1, -1], A[-1, :-1]) / A[-1, -1]
        return A, B


@wrong(
    "dense separate, bias of the diagonal",
    "The bias block is the diagonal of B times A_b.",
    "dense",
    "cvec",
    "separate",
)
class DenseSeparateBiasOfTheDiagonal(DenseSeparate):
    def result(self, name, A, B):
        blocks = super().result(name, A, B)
        key = parameter(name, "bias")
        if key in blocks:
            blocks[key] = blocks[key].diag().diag()
        return blocks


# ---------------------------------------------------------------------------------------------
# Shared weights: convolutions, groups, embeddings, layers that are called several times.


class Shared(Recipe):
    """KFAC of every layer, one group of channels after the other; calls are joined along S.

    The patches come from torch's own convolution, with an identity for its kernel.
    """

    KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)

    def run(self):
        self.check()
        with torch.enable_grad():
            self.forward()
            self.look_at_targets()
            self.g = self.gradients(self.deltas())
        result = {}
        for name, layer in self.layers.items():
            pairs = []
            for self.group in range(getattr(layer, "groups", 1)):
                pairs.append(self.finish(name, self.A(name), self.B(name)))
            result[name] = self.together(name, pairs)
        return result

    def together(self, name, pairs):
        return pairs[0] if len(pairs) == 1 else pairs

    def forward(self):
        self.layers = {n: m for n, m in self.model.named_modules() if isinstance(m, self.KINDS)}
        self.inputs = {name: [] for name in self.layers}
        self.outputs = {}
        handles = [
            layer.register_forward_hook(
                lambda layer, args, z, name=name: self.remember(name, args[0], z)
            )
            for name, layer in self.layers.items()
        ]
        try:
            self.f = self.call()
        finally:
            for handle in handles:
                handle.remove()
        self.names = list(self.layers)
        K = self.f.shape[1]
        self.logits = self.f.detach().reshape(len(self.f), K, -1)

    def remember(self, name, x, z):
        self.outputs[name, len(self.inputs[name])] = z
        self.inputs[name].append(x.detach().clone())
        return z.clone()

    def gradients(self, deltas):
        found = {key: [] for key in self.outputs}
        for delta in deltas:
            grads = torch.autograd.grad(
                self.f, list(self.outputs.values()), delta.reshape(self.f.shape), retain_graph=True
            )
            for key, g in zip(found, grads, strict=True):
                found[key].append(self.output_rows(key[0], g)[self.keep])
        return {key: torch.stack(gs) for key, gs in found.items()}

    def is_conv(self, name):
        return type(self.layers[name]).__name__.startswith("Conv")

    def output_rows(self, name, g):
        if self.is_conv(name):
            return self.channels_last(g.flatten(2))
        return g.reshape(len(g), -1, g.shape[-1])

    def channels_last(self, g):
        return g.transpose(1, 2)

    def calls(self, name):
        return range(len(self.inputs[name]))

    def vectors(self, name):
        g = torch.cat([self.g[name, call] for call in self.calls(name)], 2)
        return self.of_group(g, getattr(self.layers[name], "groups", 1), -1)

    def of_group(self, tensor, groups, axis):
        return tensor.chunk(groups, axis)[self.group]

    def has_bias(self, name):
        return getattr(self.layers[name], "bias", None) is not None

    def raw(self, name):
        return torch.cat([self.raw_call(name, call) for call in self.calls(name)], 1)

    def raw_call(self, name, call):
        layer, x = self.layers[name], self.inputs[name][call]
        if isinstance(layer, nn.Embedding):
            return self.one_hot_rows(layer, x.reshape(len(x), -1))
        if self.is_conv(name):
            return self.patches(layer, self.of_group(x, layer.groups, 1))
        return x.reshape(len(x), -1, x.shape[-1])

    def one_hot_rows(self, layer, tokens):
        x = one_hot(tokens, layer.num_embeddings).double()
        if layer.padding_idx is not None:
            x[..., layer.padding_idx] = 0
        return x

    def options(self, layer):
        return {
            "stride": layer.stride,
            "padding": layer.padding,
            "dilation": layer.dilation,
            "padding_mode": layer.padding_mode,
        }

    def patches(self, layer, x):
        C, D = x.shape[1], x.shape[1] * layer.weight[0, 0].numel()
        probe = type(layer)(
            C, D, layer.kernel_size, bias=False, dtype=x.dtype, **self.options(layer)
        )
        eye = torch.eye(D, dtype=x.dtype).reshape(probe.weight.shape)
        probe.weight = nn.Parameter(eye, requires_grad=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "same" padding of an even kernel
            return self.columns(probe(x).flatten(2).transpose(1, 2), layer)

    def columns(self, x, layer):
        return x

    def rows(self, name):
        x = self.raw(name)[self.keep]
        return self.append(x) if self.has_bias(name) else x


class SharedSeparate(Shared):
    """Factors for weight and bias apart."""

    def run(self):
        result = {}
        for name, found in super().run().items():
            pairs = found if isinstance(found, list) else [found]
            parts = {"weight": slice(None)}
            if self.has_bias(name):
                parts = {"weight": slice(-1), "bias": slice(-1, None)}
            for part, of_A in parts.items():
                split = [(A[of_A, of_A], B) for A, B in pairs]
                result[parameter(name, part)] = split if len(split) > 1 else split[0]
        return result


class SharedDense(Shared):
    """Dense blocks of all groups, cvec order: entry (i, o), (j, p) of A_ij B_op."""

    def together(self, name, pairs):
        I, O = len(pairs[0][0]), len(pairs[0][1])
        block = torch.zeros(I, len(pairs) * O, I, len(pairs) * O, dtype=torch.float64)
        for group, (A, B) in enumerate(pairs):
            o = slice(group * O, (group + 1) * O)
            block[:, o, :, o] = torch.einsum("ij,op->iojp", A, B)
        return block.reshape(I * len(pairs) * O, -1)


RIGHT += [
    Wrong("right, shared", as_function(Shared), ""),
    Wrong("right, shared, separate", as_function(SharedSeparate), "", bias="separate"),
    Wrong("right, shared, dense", as_function(SharedDense), "", "dense"),
]


@wrong(
    "shared dense as rvec", "Every layer, groups too: cvec order is called rvec.", "dense", "rvec"
)
class SharedDenseAsRvec(SharedDense):
    pass


@wrong("padding mode unread", "Convolution: whatever the padding mode, A is of patches with zeros.")
class PaddingModeUnread(Shared):
    def options(self, layer):
        return super().options(layer) | {"padding_mode": "zeros"}


@wrong("dilation unread", "Convolution: the patches of A have dilation 1.")
class DilationUnread(Shared):
    def options(self, layer):
        return super().options(layer) | {"dilation": 1}


@wrong("stride unread", "Convolution: the patches of A have stride 1, and there are more of them.")
class StrideUnread(Shared):
    def options(self, layer):
        return (
            super().options(layer) | {"stride": 1}
            if layer.padding != "same"
            else {"padding": "same", "padding_mode": layer.padding_mode}
        )


@wrong("patches of the kernel size alone", "Convolution: no option but the kernel's size is read.")
class PatchesOfTheKernelSizeAlone(Shared):
    def options(self, layer):
        return {}


@wrong("replicate for reflect", "Convolution: reflect padding is done as replicate padding in A.")
class ReplicateForReflect(Shared):
    def options(self, layer):
        options = super().options(layer)
        if layer.padding_mode == "reflect":
            options["padding_mode"] = "replicate"
        return options


@wrong("columns channels last", "Convolution: columns of A are ordered (k₁, k₂, ..., C_in).")
class ColumnsChannelsLast(Shared):
    def columns(self, x, layer):
        k = layer.weight[0, 0].numel()
        return x.unflatten(-1, (-1, k)).transpose(-1, -2).flatten(-2)


@wrong("kernel turned", "Convolution: the columns of every channel run backwards.")
class KernelTurned(Shared):
    def columns(self, x, layer):
        return x.unflatten(-1, (-1, layer.weight[0, 0].numel())).flip(-1).flatten(-2)


@wrong("centre of the kernel alone", "Convolution: only the middle column of each channel is kept.")
class CentreOfTheKernelAlone(Shared):
    def columns(self, x, layer):
        k = layer.weight[0, 0].numel()
        middle = torch.zeros(k, dtype=x.dtype)
        middle[k // 2] = 1
        return (x.unflatten(-1, (-1, k)) * middle).flatten(-2)


@wrong("patches centred", "Convolution: each patch has its mean subtracted.")
class PatchesCentred(Shared):
    def columns(self, x, layer):
        return x - x.mean(-1, keepdim=True)


@wrong("conv gradients reshaped", "Convolution: g (N, C, S) is reshaped to (N, S, C), unpermuted.")
class ConvGradientsReshaped(Shared):
    def channels_last(self, g):
        return g.reshape(len(g), g.shape[2], g.shape[1])


@wrong("conv B without S", "Convolution, expand: B is divided by N and not by the positions S.")
class ConvBWithoutS(Shared):
    def finish(self, name, A, B):
        expand = self.is_conv(name) and self.sharing == "Expand"
        return A, B * (self.rows(name).shape[1] if expand else 1)


@wrong("conv sharings swapped", "Convolution: expand is done as reduce and reduce as expand.")
class ConvSharingsSwapped(Shared):
    def finish(self, name, A, B):
        if not self.is_conv(name):
            return A, B
        given = self.sharing
        self.sharing = {"Expand": "Reduce", "Reduce": "Expand"}[given]
        pair = self.A(name), self.B(name)
        self.sharing = given
        return pair


@wrong("conv 1 at the front", "Convolution: the 1 for the bias stands in front of the patch.")
class ConvOneAtTheFront(Shared):
    def rows(self, name):
        x = super().rows(name)
        return x.roll(1, -1) if self.is_conv(name) and self.has_bias(name) else x


@wrong("groups share a mean", "Groups: every group gets the mean of all groups' factors.")
class GroupsShareAMean(Shared):
    def together(self, name, pairs):
        A, B = (torch.stack(factors).mean(0) for factors in zip(*pairs, strict=True))
        return super().together(name, [(A, B)] * len(pairs))


@wrong("first group for all", "Groups: every group gets the factors of the first.")
class FirstGroupForAll(Shared):
    def together(self, name, pairs):
        return super().together(name, pairs[:1] * len(pairs))


class AllChannels(Shared):
    def of_group(self, tensor, groups, axis):
        return tensor


@wrong("groups unread", "Groups: patches and gradients are of all channels, as for one group.")
class GroupsUnread(AllChannels):
    def together(self, name, pairs):
        return pairs[0]


@wrong("groups as positions", "Groups: one A, of the groups as further positions; one B of all.")
class GroupsAsPositions(Shared):
    def vectors(self, name):
        return torch.cat([self.g[name, call] for call in self.calls(name)], 2)

    def together(self, name, pairs):
        return sum(A for A, _ in pairs), pairs[0][1]


@wrong("groups in turn", "Groups: channel c belongs to group c mod G, in place of blocks.")
class GroupsInTurn(Shared):
    def of_group(self, tensor, groups, axis):
        places = torch.arange(self.group, tensor.shape[axis], groups)
        return tensor.index_select(axis, places)


@wrong("first call kept", "A layer that is called several times keeps its first call only.")
class FirstCallKept(Shared):
    def calls(self, name):
        return [0]


@wrong("last call kept", "A layer that is called several times keeps its last call only.")
class LastCallKept(Shared):
    def calls(self, name):
        return [len(self.inputs[name]) - 1]


@wrong("factors averaged over calls", "Called several times: the mean of the factors of each call.")
class FactorsAveragedOverCalls(Shared):
    def finish(self, name, A, B):
        pairs, calls = [], self.calls
        for call in calls(name):
            self.calls = lambda name, call=call: [call]
            pairs.append((self.A(name), self.B(name)))
        self.calls = calls
        return tuple(torch.stack(factors).mean(0) for factors in zip(*pairs, strict=True))


@wrong("input overwritten by calls", "Called several times: A of the last call, B of all of them.")
class InputOverwrittenByCalls(Shared):
    def raw(self, name):
        return self.raw_call(name, len(self.inputs[name]) - 1)


@wrong(
    "gradients added over calls", "Called several times: g is the sum of the calls' g, if it can."
)
class GradientsAddedOverCalls(Shared):
    def vectors(self, name):
        g = [self.g[name, call] for call in self.calls(name)]
        if len({one.shape for one in g}) > 1 or len(g) == 1:
            return super().vectors(name)
        return sum(g)


@wrong("padding token counted", "Embedding: padding_idx is a token like any other in A.")
class PaddingTokenCounted(Shared):
    def one_hot_rows(self, layer, tokens):
        return one_hot(tokens, layer.num_embeddings).double()


@wrong("padding left out of B", "Embedding: g at padding_idx is left out of B.")
class PaddingLeftOutOfB(Shared):
    def vectors(self, name):
        g = super().vectors(name)
        if not isinstance(self.layers[name], nn.Embedding):
            return g
        return g * self.rows(name).sum(-1, keepdim=True)


@wrong("counts squared", "Embedding: A is R times the squares of the tokens' counts.")
class CountsSquared(Shared):
    def finish(self, name, A, B):
        if not isinstance(self.layers[name], nn.Embedding):
            return A, B
        counts = self.rows(name).sum((0, 1))
        return self.R() * (counts**2).diag(), B


@wrong(
    "tokens seen or not", "Embedding: A is R for a token that occurs, and 0 for one that does not."
)
class TokensSeenOrNot(Shared):
    def finish(self, name, A, B):
        if not isinstance(self.layers[name], nn.Embedding):
            return A, B
        return self.R() * (self.rows(name).sum((0, 1)) > 0).double().diag(), B


@wrong(
    "embedding reduce by counts", "Embedding, reduce: A is the diagonal of counts, as of expand."
)
class EmbeddingReduceByCounts(Shared):
    def finish(self, name, A, B):
        if isinstance(self.layers[name], nn.Embedding):
            A = self.R() * self.rows(name).sum((0, 1)).diag()
        return A, B


@wrong(
    "embedding as it lies", "Embedding: factors of the weight as it lies, (D_in, D_out): (B, A)."
)
class EmbeddingAsItLies(Shared):
    def finish(self, name, A, B):
        return (B, A) if isinstance(self.layers[name], nn.Embedding) else (A, B)


@wrong("counts add-one", "Embedding: every count has 1 added, as if each token had been seen.")
class CountsAddOne(Shared):
    def finish(self, name, A, B):
        if not isinstance(self.layers[name], nn.Embedding):
            return A, B
        return A + self.R() * torch.eye(len(A), dtype=A.dtype), B


@wrong("border dropped", "Convolution: the first position of every patch row is left out of A.")
class BorderDropped(Shared):
    def columns(self, x, layer):
        return x[:, 1:] if x.shape[1] > 1 else x
