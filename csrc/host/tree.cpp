#include "tree.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <queue>

namespace mpq::host {
namespace {

constexpr int kRootSweeps = 300;
constexpr int kNodeSweeps = 30;
constexpr double kStall = 0.03;  // two sweeps in a row that close less of the gap than this end a node's ascent
constexpr double kRootStall = 0.003;
constexpr int kConvexPasses = 2;

class Tree {
 public:
  Tree(const Problem& problem, const TreeOptions& options, Watch& watch)
      : p_(problem), options_(options), watch_(watch), leaf_(problem) {}

  TreeResult run(Node root, const std::vector<int>& incumbent) {
    if (!incumbent.empty()) offer(incumbent);
    open_root(std::move(root));
    while (!stopped_) {
      result_.bound = std::max(result_.bound, std::min(lowest_open(), cutoff()));
      if (over_budget(result_.bound)) break;
      Open next;
      if (!take(next)) {
        result_.finished = true;
        break;
      }
      if (next.bound >= cutoff()) continue;
      Node child = next.parent->node.fixed(next.pair);
      result_.work += static_cast<double>(next.parent->node.S.size() + next.parent->node.Q.size());
      std::vector<int> chosen = next.parent->chosen;
      chosen[next.parent->node.layer[next.pair % next.parent->node.L]] = next.pair / next.parent->node.L;
      next.parent.reset();
      expand(std::move(child), std::move(chosen), next.bound, false);
    }
    if (result_.finished) result_.bound = std::max(result_.bound, cutoff());
    return std::move(result_);
  }

 private:
  struct Stored {  // a node that was branched on; lives until its last child is taken
    Node node;
    std::vector<int> chosen;  // by layer of the problem; -1: open
    size_t* account;          // bytes of all stored nodes
    Stored(Node n, std::vector<int> c, size_t* a) : node(std::move(n)), chosen(std::move(c)), account(a) {
      *account += node.bytes();
    }
    Stored(const Stored&) = delete;
    ~Stored() { *account -= node.bytes(); }
  };
  struct Open {
    double bound = 0;
    int64_t number = 0;
    std::shared_ptr<Stored> parent;
    int pair = 0;         // the child fixes this pair of the parent
    double below = kInf;  // the least bound of this and everything under it on the stack
    bool operator<(const Open& other) const {
      return bound > other.bound || (bound == other.bound && number < other.number);
    }
  };

  // A subtree whose bound reaches this is dropped.
  double cutoff() const {
    if (result_.choice.empty()) return kInf;
    return result_.value - options_.relative * std::fabs(result_.value) - options_.absolute;
  }

  bool over_budget(double bound) {
    if (watch_.stopped(result_.value, bound, result_.nodes) || result_.work >= options_.work) stopped_ = true;
    return stopped_;
  }

  void offer(const std::vector<int>& choice) {
    leaf_.set(choice);
    if (!leaf_.feasible() || leaf_.value() >= result_.value) return;
    result_.value = leaf_.value();
    result_.choice = choice;
  }

  double lowest_open() const {
    double lowest = kInf;
    if (!queue_.empty()) lowest = queue_.top().bound;
    if (!stack_.empty()) lowest = std::min(lowest, stack_.back().below);
    return lowest;
  }

  bool take(Open& next) {
    if (!stack_.empty()) {
      next = std::move(stack_.back());
      stack_.pop_back();
    } else if (!queue_.empty()) {
      next = queue_.top();
      queue_.pop();
    } else {
      return false;
    }
    return true;
  }

  void open_root(Node root) {
    if (!root.drop_unfitting() || !root.take_minima()) return;
    root.move_z(10);
    // S starts with entries of either sign: nothing of (*) is a bound before the first full sweep.
    if (root.take_minima() && root.sweep()) expand(std::move(root), std::vector<int>(p_.L, -1), -kInf, true);
  }

  // Raises the node's bound, and queues its children unless it can be dropped. `floor`: a bound known beforehand.
  void expand(Node node, std::vector<int> chosen, double floor, bool is_root) {
    ++result_.nodes;
    const bool open = ascend(node, chosen, is_root);
    floor = std::max(floor, node.bound);
    if (stopped_) result_.bound = std::max(result_.bound, std::min({floor, lowest_open(), cutoff()}));
    if (stopped_ || !open) return;
    const int layer = branching_layer(node);
    std::vector<std::pair<double, int>> children;  // the bound of each, and the pair it fixes
    for (int i = layer; i < node.n; i += node.L)
      if (node.dead[i] == 0) children.push_back({after_[i], i});
    std::sort(children.begin(), children.end());
    auto parent = std::make_shared<Stored>(std::move(node), std::move(chosen), &stored_);
    const bool deep = stored_ > options_.memory;
    for (size_t c = children.size(); c-- > 0;) {
      Open child{std::max(floor, children[c].first), number_++, parent, children[c].second, kInf};
      if (deep) {
        child.below = std::min(child.bound, stack_.empty() ? kInf : stack_.back().below);
        stack_.push_back(std::move(child));
      } else {
        queue_.push(std::move(child));
      }
    }
  }

  // Sweeps until that stalls, drops choices that the look-ahead rules out, fixes layers with one choice left, and
  // again. True: there is something left to branch on, and after_ holds the look-ahead of every choice.
  bool ascend(Node& node, std::vector<int>& chosen, bool is_root) {
    for (bool first = true;; first = false) {
      if (node.L == 0) {
        offer(chosen);
        return false;
      }
      if (!node.drop_unfitting() || !node.take_minima() || node.bound >= cutoff()) return false;
      if (!sweeps(node, is_root && first ? kRootSweeps : kNodeSweeps, is_root ? kRootStall : kStall)) return false;
      node.look_ahead(cutoff(), after_, scratch_);
      result_.work += static_cast<double>(node.S.size() + node.Q.size());
      for (int i = 0; i < node.n; ++i)
        if (after_[i] >= cutoff()) node.dead[i] = kForbidden;
      int only = -1;
      if (!single_choice(node, only)) return false;
      if (only < 0) return true;
      while (only >= 0) {
        chosen[node.layer[only % node.L]] = only / node.L;
        result_.work += static_cast<double>(node.S.size() + node.Q.size());
        node = node.fixed(only);
        if (!single_choice(node, only)) return false;
      }
    }
  }

  // False: the node can be dropped, or the search has to stop.
  bool sweeps(Node& node, int most, double stall) {
    double before = node.bound;
    int stalled = 0;
    for (int s = 0; s < most && node.L > 1; ++s) {
      if (over_budget(result_.bound)) return false;
      result_.work += static_cast<double>(node.S.size() + node.Q.size());
      if (!node.Q.empty()) {
        node.move_z(kConvexPasses);
        if (!node.take_minima() || node.bound >= cutoff()) return false;
      }
      node.spread();
      if (!node.sweep() || node.bound >= cutoff()) return false;
      stalled = node.bound - before < stall * (cutoff() - node.bound) ? stalled + 1 : 0;
      if (stalled == 2) break;
      before = node.bound;
    }
    return true;
  }

  // `only`: the last choice of some layer, or -1. False: a layer has none left.
  static bool single_choice(const Node& node, int& only) {
    only = -1;
    for (int l = 0; l < node.L; ++l) {
      int alive = 0, last = -1;
      for (int i = l; i < node.n; i += node.L)
        if (node.dead[i] == 0) {
          ++alive;
          last = i;
        }
      if (alive == 0) return false;
      if (alive == 1) {
        only = last;
        break;
      }
    }
    return true;
  }

  // The layer whose choices all raise the bound most.
  int branching_layer(const Node& node) const {
    double best = -kInf;
    int layer = 0;
    for (int l = 0; l < node.L; ++l) {
      double least = kInf, sum = 0;
      for (int i = l; i < node.n; i += node.L) {
        if (node.dead[i] != 0) continue;
        least = std::min(least, after_[i] - node.bound);
        sum += after_[i] - node.bound;
      }
      if (least + 1e-3 * sum > best) {
        best = least + 1e-3 * sum;
        layer = l;
      }
    }
    return layer;
  }

  const Problem& p_;
  const TreeOptions options_;
  Watch& watch_;
  Assignment leaf_;
  TreeResult result_;
  size_t stored_ = 0;  // before the containers: nodes in them book on it
  std::priority_queue<Open> queue_;
  std::vector<Open> stack_;
  int64_t number_ = 0;
  bool stopped_ = false;
  std::vector<double> after_, scratch_;
};

}  // namespace

TreeResult search_tree(const Problem& problem, Node root, const std::vector<int>& incumbent, const TreeOptions& options,
                       Watch& watch) {
  return Tree(problem, options, watch).run(std::move(root), incumbent);
}

}  // namespace mpq::host
