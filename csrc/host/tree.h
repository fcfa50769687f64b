// Branch and bound over nodes of the dual ascent.
#pragma once

#include "ascent.h"

namespace mpq::host {

struct TreeOptions {
  double relative = 1e-9;           // subtrees that cannot improve the incumbent by more than this share of it ...
  double absolute = 0;              // ... plus this are dropped
  double work = kInf;               // stop after this many row entries touched: unlike seconds, the same everywhere
  size_t memory = size_t{1} << 30;  // bytes of stored nodes from which on the search goes depth-first
};

struct TreeResult {
  std::vector<int> choice;  // the best known; empty when there is none
  double value = kInf;
  double bound = -kInf;  // no feasible choice is below, as far as rounding of about 1e-12 goes
  int64_t nodes = 0;
  double work = 0;
  bool finished = false;  // nothing is left that could improve `value` by more than the tolerance
};

// Searches below `root`; `incumbent` may be empty.
TreeResult search_tree(const Problem& problem, Node root, const std::vector<int>& incumbent, const TreeOptions& options,
                       Watch& watch);

}  // namespace mpq::host
