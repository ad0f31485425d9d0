// How Python hands a struct of numbers to C++: as one flat tuple, its fields in order.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <type_traits>

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

}  // namespace msformer
