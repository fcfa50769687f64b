// mpqkern._host: the solvers' searches, over numpy arrays. mpqkern/solve/{quadratic,core}.py drive them.
#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <random>
#include <string>

#include "knapsack.h"
#include "tree.h"

namespace py = pybind11;
using namespace mpq::host;

namespace {

using Doubles = py::array_t<double, py::array::c_style | py::array::forcecast>;
using Wholes = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;
using Flags = py::array_t<uint8_t, py::array::c_style | py::array::forcecast>;
using Progress = std::optional<py::function>;

void want(bool good, const std::string& argument, const py::array& got, const std::string& wanted) {
  if (!good)
    throw py::value_error(argument + " has shape " + std::string(py::str(got.attr("shape"))) + "; wanted " + wanted);
}

// The arrays live as long as this, and are not copied where they are what was asked for.
struct Arrays {
  Doubles unary, pairwise, use, cap;
  Flags allowed;
  Problem problem;

  Arrays(Doubles unary_, Doubles pairwise_, Doubles use_, Doubles cap_, Flags allowed_)
      : unary(unary_), pairwise(pairwise_), use(use_), cap(cap_), allowed(allowed_) {
    want(unary.ndim() == 2, "unary", unary, "[L, B]");
    const py::ssize_t L = unary.shape(0), B = unary.shape(1), n = L * B;
    want(B >= 1 && B <= kMostChoices, "unary", unary, "[L, B] with B from 1 to " + std::to_string(kMostChoices));
    want(pairwise.size() == n * n, "pairwise", pairwise, "[L, B, L, B] like unary");
    want(cap.ndim() == 1, "cap", cap, "[K]");
    want(use.size() == cap.size() * n, "use", use, "[K, L, B] like cap and unary");
    want(allowed.size() == n, "allowed", allowed, "[L, B] like unary");
    problem = {static_cast<int>(L), static_cast<int>(B), static_cast<int>(cap.size()),
               unary.data(),        pairwise.data(),     use.data(),
               cap.data(),          allowed.data()};
    for (py::ssize_t l = 0; l < L; ++l) {
      bool any = false;
      for (py::ssize_t b = 0; b < B; ++b) any |= allowed.data()[l * B + b] != 0;
      if (!any) throw py::value_error("allowed has no choice for layer " + std::to_string(l) + "; wanted one or more");
    }
  }

  std::vector<int> checked(std::vector<int> choice) const {
    if (choice.size() != static_cast<size_t>(problem.L))
      throw py::value_error("choice has " + std::to_string(choice.size()) + " entries; wanted " +
                            std::to_string(problem.L));
    for (int l = 0; l < problem.L; ++l)
      if (choice[l] < 0 || choice[l] >= problem.B || !problem.allowed[l * problem.B + choice[l]])
        throw py::value_error("choice[" + std::to_string(l) + "]=" + std::to_string(choice[l]) +
                              "; wanted an allowed choice");
    return choice;
  }

  Node root(const std::optional<Doubles>& form, double share) const {
    Node node = Node::root(problem);
    if (!form) return node;
    want(form->size() == static_cast<py::ssize_t>(problem.n()) * problem.n(), "form", *form, "[n, n], n = L * B");
    node.share_convex(form->data(), share);
    return node;
  }
};

// Called by searches that hold no lock on the interpreter: shows progress, and turns Ctrl-C into an orderly stop.
class Reporter {
 public:
  explicit Reporter(const Progress& progress) : progress_(progress) {}
  bool operator()(double incumbent, double bound, double seconds, int64_t nodes) {
    py::gil_scoped_acquire held;
    try {
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
      if (progress_) (*progress_)(incumbent, bound, seconds, nodes);
    } catch (py::error_already_set& error) {
      if (!error.matches(PyExc_KeyboardInterrupt)) throw;
      interrupted = true;
    }
    return !interrupted;
  }
  bool interrupted = false;

 private:
  const Progress& progress_;
};

py::dict local_search_py(Doubles unary, Doubles pairwise, Doubles use, Doubles cap, Flags allowed,
                         std::vector<int> choice, int64_t kicks, uint64_t seed, double seconds,
                         const Progress& progress) {
  const Arrays arrays(unary, pairwise, use, cap, allowed);
  choice = arrays.checked(std::move(choice));
  Reporter reporter(progress);
  double value;
  {
    py::gil_scoped_release free;
    Watch watch(seconds, std::ref(reporter));
    value = local_search(arrays.problem, choice, kicks, seed, watch);
  }
  return py::dict(py::arg("choice") = choice, py::arg("value") = value, py::arg("interrupted") = reporter.interrupted);
}

py::dict tree_py(Doubles unary, Doubles pairwise, Doubles use, Doubles cap, Flags allowed,
                 const std::optional<std::vector<int>>& incumbent, const std::optional<Doubles>& form, double share,
                 double relative, double absolute, double work, double memory, double seconds,
                 const Progress& progress) {
  const Arrays arrays(unary, pairwise, use, cap, allowed);
  const std::vector<int> known = incumbent ? arrays.checked(*incumbent) : std::vector<int>();
  Node root = arrays.root(form, share);
  Reporter reporter(progress);
  TreeResult result;
  {
    py::gil_scoped_release free;
    Watch watch(seconds, std::ref(reporter));
    const TreeOptions options{relative, absolute, work, static_cast<size_t>(memory)};
    result = search_tree(arrays.problem, std::move(root), known, options, watch);
  }
  return py::dict(py::arg("choice") = result.choice, py::arg("value") = result.value, py::arg("bound") = result.bound,
                  py::arg("nodes") = result.nodes, py::arg("work") = result.work, py::arg("finished") = result.finished,
                  py::arg("interrupted") = reporter.interrupted);
}

// How far the two sides of a node's identity drift apart: the largest difference over random choices after each of
// `rounds` rounds of every operation, down to the last layer, and the largest multiplier met.
py::tuple identity_error_py(Doubles unary, Doubles pairwise, Doubles use, Doubles cap, Flags allowed,
                            const std::optional<Doubles>& form, double share, int rounds, uint64_t seed) {
  const Arrays arrays(unary, pairwise, use, cap, allowed);
  const Problem& p = arrays.problem;
  Node node = arrays.root(form, share);
  std::mt19937_64 random(seed);
  std::vector<int> fixed(p.L, -1);
  Assignment plain(p);
  double error = 0, steepest = 0;
  const auto compare = [&] {
    for (int trial = 0; trial < 4; ++trial) {
      std::vector<int> choice = fixed;
      for (int l = 0; l < p.L; ++l)
        while (choice[l] < 0 || !p.allowed[l * p.B + choice[l]]) choice[l] = static_cast<int>(random() % p.B);
      plain.set(choice);
      error = std::max(error, std::fabs(node.value(choice) - plain.value()));
    }
    for (double m : node.mu) steepest = std::max(steepest, m);
    for (double m : node.lambda) steepest = std::max(steepest, m);
  };
  compare();
  while (node.L > 0) {
    for (int round = 0; round < rounds; ++round) {
      if (!node.take_minima()) return py::make_tuple(error, steepest);
      compare();
      node.move_z(2);
      compare();
      node.spread();
      compare();
      if (!node.sweep()) return py::make_tuple(error, steepest);
      compare();
    }
    int i = static_cast<int>(random() % node.n);
    while (node.dead[i] != 0) i = static_cast<int>(random() % node.n);
    fixed[node.layer[i % node.L]] = i / node.L;
    node = node.fixed(i);
    compare();
  }
  return py::make_tuple(error, steepest);
}

py::dict cheapest_py(Wholes cost, Wholes use, Wholes rest, Flags allowed, const std::vector<int>& known, bool any,
                     double work) {
  want(cost.ndim() == 2, "cost", cost, "[U, B]");
  const py::ssize_t U = cost.shape(0), B = cost.shape(1), K = rest.size();
  want(rest.ndim() == 1 && K >= 1, "rest", rest, "[K] with K at least 1");
  want(use.size() == K * U * B, "use", use, "[K, U, B] like rest and cost");
  want(allowed.size() == U * B, "allowed", allowed, "[U, B] like cost");
  for (py::ssize_t u = 0; u < U; ++u)
    if (std::count(allowed.data() + u * B, allowed.data() + (u + 1) * B, 0) == B)
      throw py::value_error("allowed has no choice for unit " + std::to_string(u) + "; wanted one or more");
  if (!known.empty() && static_cast<py::ssize_t>(known.size()) != U)
    throw py::value_error("known has " + std::to_string(known.size()) + " entries; wanted none or " +
                          std::to_string(U));
  for (int b : known)
    if (b < 0 || b >= B)
      throw py::value_error("known holds " + std::to_string(b) + "; wanted choices below " + std::to_string(B));
  const Knapsack problem{static_cast<int>(U), static_cast<int>(B), static_cast<int>(K), cost.data(),
                         use.data(),          rest.data(),         allowed.data()};
  KnapsackResult result;
  {
    py::gil_scoped_release free;
    result = cheapest(problem, known, any, work);
  }
  return py::dict(py::arg("choice") = result.choice, py::arg("done") = result.done, py::arg("first") = result.first);
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Searches of the solvers; see mpqkern.solve.quadratic and mpqkern.solve.core.";
  m.def("local_search", &local_search_py, py::arg("unary"), py::arg("pairwise"), py::arg("use"), py::arg("cap"),
        py::arg("allowed"), py::arg("choice"), py::arg("kicks"), py::arg("seed"), py::arg("seconds"),
        py::arg("progress") = py::none());
  m.def("cheapest", &cheapest_py, py::arg("cost"), py::arg("use"), py::arg("rest"), py::arg("allowed"),
        py::arg("known"), py::arg("any"), py::arg("work"));
  m.def("tree", &tree_py, py::arg("unary"), py::arg("pairwise"), py::arg("use"), py::arg("cap"), py::arg("allowed"),
        py::arg("incumbent"), py::arg("form"), py::arg("share"), py::arg("relative"), py::arg("absolute"),
        py::arg("work"), py::arg("memory"), py::arg("seconds"), py::arg("progress") = py::none());
  m.def("identity_error", &identity_error_py, py::arg("unary"), py::arg("pairwise"), py::arg("use"), py::arg("cap"),
        py::arg("allowed"), py::arg("form"), py::arg("share"), py::arg("rounds"), py::arg("seed"));
}
