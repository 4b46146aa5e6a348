// Looks up an operator in the dispatcher, for C++ that calls one with autograd and on any device.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

namespace rlhf_lightning {

// `name` includes the namespace: "rlhf_lightning::gae". Each call looks it up anew: keep the result in a static.
template <typename Signature>
auto operation(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace rlhf_lightning
