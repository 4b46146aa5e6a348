// An operator of the library as the dispatcher knows it, for C++ that calls one through its gradients and devices.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

namespace rlhf_lightning {

// name: with its namespace, "rlhf_lightning::gae". Looked up anew by each call: keep the result in a static.
template <typename Signature>
auto operation(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace rlhf_lightning
