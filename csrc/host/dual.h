// The linear relaxation of a Part, by the dual simplex method: the prices with the highest bound.
//
// Every unit has one basic option that needs no row of its own, its key (generalized upper bounds, Dantzig and
// Van Slyke 1967). So the basis is K x K, and after a change of the part a handful of pivots, each a pass over the
// options, gives the new prices. It need not be accurate, nor even end: any prices >= 0 give a valid bound (see
// Priced).
#pragma once

#include "part.h"

namespace mpq::host {

struct Basis {
  std::vector<int> key;   // [units]: the option that takes what the other basic ones leave of 1
  std::vector<int> rows;  // [K]: another option in the basis, or ~k for the slack of budget k
};

struct Scale {
  double cost;               // what costs are multiplied by
  std::vector<double> rest;  // [K]: what uses are multiplied by
};

struct Relaxed {
  // [K], >= 0, in cost per use. Where not even shares of options fit, their bound exceeds `beyond`, up to rounding.
  std::vector<double> price;
  int pivots = 0;
};

// A basis that suits prices 0: every unit at its least cost.
Basis slack_basis(const Part& part);
// The relaxation without dead options, of which every unit has one that is not; from and to a basis whose reduced costs
// are not negative. It ends after `most` pivots, too.
Relaxed relax(const Part& part, const std::vector<uint8_t>& dead, const Scale& scale, double beyond, double most,
              Basis& basis);

}  // namespace mpq::host
