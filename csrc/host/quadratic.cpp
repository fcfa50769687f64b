#include "quadratic.h"

namespace mpq::host {

Assignment::Assignment(const Problem& problem)
    : p_(problem), choice_(problem.L), marginal_(problem.n()), used_(problem.K) {}

void Assignment::set(const std::vector<int>& choice) {
  const int n = p_.n();
  choice_ = choice;
  for (int i = 0; i < n; ++i) marginal_[i] = p_.allowed[i] ? p_.unary[i] : kInf;
  for (int l = 0; l < p_.L; ++l) {
    const double* pairs = p_.pairwise + static_cast<int64_t>(l * p_.B + choice[l]) * n;
    for (int i = 0; i < n; ++i) marginal_[i] += pairs[i];
  }
  double twice = 0;  // marginals count every pair from both ends, so count unary terms twice as well
  for (int l = 0; l < p_.L; ++l) twice += p_.unary[l * p_.B + choice[l]] + marginal_[l * p_.B + choice[l]];
  value_ = twice / 2;
  for (int k = 0; k < p_.K; ++k) {
    const double* use = p_.use + static_cast<int64_t>(k) * n;
    used_[k] = 0;
    for (int l = 0; l < p_.L; ++l) used_[k] += use[l * p_.B + choice[l]];
  }
}

void Assignment::move(int layer, int choice) {
  const int n = p_.n(), from = layer * p_.B + choice_[layer], to = layer * p_.B + choice;
  if (from == to) return;
  value_ += marginal_[to] - marginal_[from];
  const double* gone = p_.pairwise + static_cast<int64_t>(from) * n;
  const double* come = p_.pairwise + static_cast<int64_t>(to) * n;
  for (int i = 0; i < n; ++i) marginal_[i] += come[i] - gone[i];
  for (int k = 0; k < p_.K; ++k)
    used_[k] += p_.use[static_cast<int64_t>(k) * n + to] - p_.use[static_cast<int64_t>(k) * n + from];
  choice_[layer] = choice;
}

bool Assignment::feasible() const {
  for (int k = 0; k < p_.K; ++k)
    if (used_[k] > p_.cap[k]) return false;
  return true;
}

bool Assignment::fits(int layer, int choice) const {
  for (int k = 0; k < p_.K; ++k) {
    const double* use = p_.use + static_cast<int64_t>(k) * p_.n() + layer * p_.B;
    if (used_[k] + use[choice] - use[choice_[layer]] > p_.cap[k]) return false;
  }
  return true;
}

Watch::Watch(double seconds, Report report)
    : start_(Clock::now()), next_(start_), limit_(seconds), report_(std::move(report)) {}

double Watch::seconds() const { return std::chrono::duration<double>(Clock::now() - start_).count(); }

bool Watch::stopped(double incumbent, double bound, int64_t nodes) {
  if (stopped_) return true;
  const Clock::time_point now = Clock::now();
  const double elapsed = std::chrono::duration<double>(now - start_).count();
  if (elapsed >= limit_) return stopped_ = true;
  if (report_ && now >= next_) {
    next_ = now + std::chrono::milliseconds(50);
    stopped_ = !report_(incumbent, bound, elapsed, nodes);
  }
  return stopped_;
}

}  // namespace mpq::host
