// How Python hands a struct of numbers to C++: as one flat tuple, its fields in order.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "abi.h"

namespace msformer {

// Reads the fields of a struct one after the other. A struct within it needs a function `read_fields(Reader&, Struct&)`
// in its own namespace.
class Reader {
 public:
  Reader(const pybind11::tuple& values, const char* module)
      : values_(values.ptr()), count_(PyTuple_GET_SIZE(values.ptr())), module_(module) {}

  template <class... Fields>
  void fill(Fields&... fields) {
    (read(fields), ...);
  }

  void finish() const {
    if (next_ != count_) fail("no more");
  }

 private:
  PyObject* next() {
    if (next_ == count_) fail("more");
    return PyTuple_GET_ITEM(values_, next_++);
  }
  [[noreturn]] void fail(const char* how) const {
    throw std::invalid_argument(std::string(module_) + ": got " + std::to_string(count_) + " values, expected " + how +
                                " after " + std::to_string(next_));
  }
  long long integer() {
    const long long value = PyLong_AsLongLong(next());
    if (value == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
    return value;
  }
  double real() {
    const double value = PyFloat_AsDouble(next());
    if (value == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
    return value;
  }
  void* address() {
    void* value = PyLong_AsVoidPtr(next());
    if (!value && PyErr_Occurred()) throw pybind11::error_already_set();
    return value;
  }

  template <class Field>
  void read(Field& field) {
    if constexpr (std::is_integral_v<Field> || std::is_enum_v<Field>) {
      const long long value = integer();
      field = static_cast<Field>(value);
      if (static_cast<long long>(field) != value) fail("a smaller one");
    } else if constexpr (std::is_floating_point_v<Field>) {
      field = static_cast<Field>(real());
    } else if constexpr (std::is_pointer_v<Field>) {
      field = static_cast<Field>(address());
    } else {
      read_fields(*this, field);
    }
  }

  PyObject* values_;
  Py_ssize_t count_, next_ = 0;
  const char* module_;
};

inline void read_fields(Reader& r, Mask& m) { r.fill(m.data, m.batch_stride, m.token_stride); }

// The parameters of the operators, in the order of their declaration in Python.
template <class P>
void read_fields(Reader& r, AffineParameters<P>& p) {
  r.fill(p.weight, p.bias);
}

template <class P>
void read_fields(Reader& r, SelfAttentionParameters<P>& p) {
  r.fill(p.query_weight, p.query_bias, p.key_weight, p.value_weight, p.value_bias, p.output_weight, p.output_bias,
         p.norm);
}

template <class P>
void read_fields(Reader& r, MixFFNParameters<P>& p) {
  r.fill(p.fc1_weight, p.fc1_bias, p.dw_weight, p.dw_bias, p.fc2_weight, p.fc2_bias, p.hidden_norm, p.norm);
}

}  // namespace msformer
