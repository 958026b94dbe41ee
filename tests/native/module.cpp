// numpy arrays in, numpy arrays out: the launchers of native.h as a Python module. An array of another dtype or layout
// is a TypeError, an error of a launch a RuntimeError with its text. Outputs are poisoned before the launch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "device/tile.h"
#include "native.h"

namespace py = pybind11;
namespace native = vtk::native;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class T>
Array<T> poisoned(std::vector<py::ssize_t> shape) {
  Array<T> out(shape);
  std::fill_n(reinterpret_cast<unsigned char*>(out.mutable_data()), out.nbytes(), static_cast<unsigned char>(0xff));
  return out;
}

template <class T>
int32_t size_of(const Array<T>& x) {
  return static_cast<int32_t>(x.size());
}

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

// x.shape = [rows, columns]: the number of rows.
template <class T>
int32_t rows_of(const Array<T>& x, py::ssize_t columns, const char* name) {
  if (x.ndim() != 2 || x.shape(1) != columns)
    throw std::invalid_argument(std::string(name) + ": expected shape [rows, " + std::to_string(columns) + "]");
  return static_cast<int32_t>(x.shape(0));
}

void bind_select(py::module_& m) {
  m.def(
      "order_keys",
      [](const Array<float>& scores) {
        auto keys = poisoned<uint32_t>({scores.size()});
        check(native::order_keys(scores.data(), size_of(scores), keys.mutable_data()));
        return keys;
      },
      py::arg("scores").noconvert());
  m.def(
      "arg_max",
      [](const Array<float>& scores, int threads) {
        int32_t best = -2;
        check(native::arg_max(scores.data(), size_of(scores), threads, &best));
        return best;
      },
      py::arg("scores").noconvert(), py::arg("threads"));
  m.def(
      "radix_select",
      [](const Array<uint32_t>& keys, int k, int threads) {
        uint32_t threshold = 0;
        int32_t ties = -1;
        check(native::radix_select(keys.data(), size_of(keys), k, threads, &threshold, &ties));
        return py::make_tuple(threshold, ties);
      },
      py::arg("keys").noconvert(), py::arg("k"), py::arg("threads"));
  m.def(
      "greedy_pick",
      [](const Array<float>& scores, int keep, bool by_rank, int blocks) {
        const auto batch = static_cast<int32_t>(scores.shape(0)), tokens = static_cast<int32_t>(scores.shape(1));
        auto indices = poisoned<int64_t>({batch, keep});
        std::vector<char> workspace(native::greedy_workspace(batch, tokens, blocks));
        check(native::greedy_pick(scores.data(), batch, tokens, keep, by_rank, blocks, workspace.data(),
                                  indices.mutable_data()));
        return indices;
      },
      py::arg("scores").noconvert(), py::arg("keep"), py::arg("by_rank"), py::arg("blocks"));
  m.def("grid_barrier", [](int groups, int blocks, int rounds, unsigned first) {
    std::vector<unsigned> counters(32 * groups, first);
    auto posted = poisoned<int32_t>({rounds, groups, blocks}), sums = poisoned<int32_t>({rounds, groups, blocks});
    check(native::grid_barrier(counters.data(), first, groups, blocks, rounds, posted.mutable_data(),
                               sums.mutable_data()));
    return py::make_tuple(posted, sums);
  });
}

template <class T>
void bind_reduce(py::module_& m) {
  m.def(
      "warp_reduce",
      [](const Array<T>& x, int op, int lanes, int stride) {
        auto out = poisoned<T>({rows_of(x, 32, "x"), 32});
        for (py::ssize_t row = 0; row < x.shape(0); ++row)
          check(native::warp_reduce<T>(x.data(row), op, lanes, stride, out.mutable_data(row)));
        return out;
      },
      py::arg("x").noconvert(), py::arg("op"), py::arg("lanes"), py::arg("stride"));
  m.def(
      "block_reduce",
      [](const Array<T>& x, int op) {
        auto out = poisoned<T>({2, x.size()});
        check(native::block_reduce<T>(x.data(), size_of(x), op, out.mutable_data()));
        return out;
      },
      py::arg("x").noconvert(), py::arg("op"));
  m.def(
      "block_prefix",
      [](const Array<T>& x) {
        auto before = poisoned<T>({x.size()}), total = poisoned<T>({x.size()});
        check(native::block_prefix<T>(x.data(), size_of(x), before.mutable_data(), total.mutable_data()));
        return py::make_tuple(before, total);
      },
      py::arg("x").noconvert());
}

// Pairs come as [words, 32] 16-bit floats in the order of the codes; columns that a word has no code for stay poisoned.
template <class Decode>
Array<uint16_t> decoded(int32_t words, const Decode& decode) {
  auto out = poisoned<uint16_t>({words, 32});
  check(decode(reinterpret_cast<uint32_t*>(out.mutable_data())));
  return out;
}

void bind_codes(py::module_& m) {
  m.def(
      "load_floats",
      [](const Array<uint16_t>& values, int dtype) {
        auto out = poisoned<float>({values.size()});
        check(native::load_floats(values.data(), dtype, size_of(values), out.mutable_data()));
        return out;
      },
      py::arg("values").noconvert(), py::arg("dtype"));
  m.def(
      "pack_codes",
      [](const Array<uint8_t>& codes, int bits) {
        const int32_t words = rows_of(codes, 32 / bits, "codes");
        auto packed = poisoned<uint32_t>({words});
        auto unpacked = poisoned<uint8_t>({words, 32 / bits});
        check(native::pack_codes(codes.data(), bits, words, packed.mutable_data(), unpacked.mutable_data()));
        return py::make_tuple(packed, unpacked);
      },
      py::arg("codes").noconvert(), py::arg("bits"));
  m.def(
      "pack_ternary",
      [](const Array<int8_t>& values) {
        const int32_t words = rows_of(values, 32, "values");
        auto planes = poisoned<uint32_t>({words, 2});
        auto unpacked = poisoned<int8_t>({words, 32});
        check(native::pack_ternary(values.data(), words, planes.mutable_data(), unpacked.mutable_data()));
        return py::make_tuple(planes, unpacked);
      },
      py::arg("values").noconvert());
  m.def(
      "pack_trits",
      [](const Array<uint8_t>& trits) {
        const int32_t bytes = rows_of(trits, 5, "trits");
        auto packed = poisoned<uint8_t>({bytes}), unpacked = poisoned<uint8_t>({bytes, 5});
        check(native::pack_trits(trits.data(), bytes, packed.mutable_data(), unpacked.mutable_data()));
        return py::make_tuple(packed, unpacked);
      },
      py::arg("trits").noconvert());
  m.def(
      "code_pairs",
      [](const Array<uint32_t>& packed, int bits, int zero, bool bfloat16) {
        return decoded(size_of(packed), [&](uint32_t* out) {
          return native::code_pairs(packed.data(), bits, zero, bfloat16, size_of(packed), out);
        });
      },
      py::arg("packed").noconvert(), py::arg("bits"), py::arg("zero"), py::arg("bfloat16"));
  m.def(
      "sign_pairs",
      [](const Array<uint32_t>& packed, bool bfloat16) {
        return decoded(size_of(packed), [&](uint32_t* out) {
          return native::sign_pairs(packed.data(), bfloat16, size_of(packed), out);
        });
      },
      py::arg("packed").noconvert(), py::arg("bfloat16"));
  m.def(
      "ternary_pairs",
      [](const Array<uint32_t>& planes, bool bfloat16) {
        const int32_t words = rows_of(planes, 2, "planes");
        return decoded(words,
                       [&](uint32_t* out) { return native::ternary_pairs(planes.data(), bfloat16, words, out); });
      },
      py::arg("planes").noconvert(), py::arg("bfloat16"));
  m.def(
      "trit_pairs",
      [](const Array<uint32_t>& packed, bool bfloat16) {
        return decoded(size_of(packed), [&](uint32_t* out) {
          return native::trit_pairs(packed.data(), bfloat16, size_of(packed), out);
        });
      },
      py::arg("packed").noconvert(), py::arg("bfloat16"));
}

void bind_tensor(py::module_& m) {
  m.def(
      "multiply_tile",
      [](const Array<uint16_t>& a, const Array<uint16_t>& b, bool bfloat16, bool waits) {
        auto d = poisoned<float>({rows_of(a, 16, "a"), rows_of(b, 16, "b")});
        check(native::multiply_tile(a.data(), b.data(), bfloat16, waits, d.mutable_data()));
        return d;
      },
      py::arg("a").noconvert(), py::arg("b").noconvert(), py::arg("bfloat16"), py::arg("waits"));
  m.def(
      "copy_ring",
      [](const Array<int32_t>& in, unsigned expected) {
        const int32_t tiles = rows_of(in, 64, "in");
        auto out = poisoned<int32_t>({tiles, 64});
        check(native::copy_ring(in.data(), tiles, expected, out.mutable_data()));
        return out;
      },
      py::arg("in").noconvert(), py::arg("expected"));
}

void bind_random(py::module_& m) {
  m.def(
      "philox",
      [](const Array<uint32_t>& counters, const Array<uint32_t>& keys) {
        const int32_t count = rows_of(counters, 4, "counters");
        if (rows_of(keys, 2, "keys") != count) throw std::invalid_argument("keys: as many rows as counters");
        auto out = poisoned<uint32_t>({count, 4});
        check(native::philox(counters.data(), keys.data(), count, out.mutable_data()));
        return out;
      },
      py::arg("counters").noconvert(), py::arg("keys").noconvert());
  m.def("random_stream", [](uint64_t seed, uint32_t position, uint32_t node, uint32_t purpose, int blocks) {
    auto out = poisoned<uint32_t>({blocks, 4});
    check(native::random_stream(seed, position, node, purpose, blocks, out.mutable_data()));
    return out;
  });
  m.def(
      "uniforms",
      [](const Array<uint32_t>& words) {
        auto below_one = poisoned<float>({words.size()}), above_zero = poisoned<float>({words.size()});
        check(native::uniforms(words.data(), size_of(words), below_one.mutable_data(), above_zero.mutable_data()));
        return py::make_tuple(below_one, above_zero);
      },
      py::arg("words").noconvert());
}

// Host functions: the same on the device.
void bind_tile(py::module_& m) {
  auto pair = [](vtk::Range r) { return py::make_tuple(r.begin, r.end); };
  m.def("ceil_div", &vtk::ceil_div<int64_t>);
  m.def("round_up", &vtk::round_up<int64_t>);
  m.def("tile_range",
        [=](int tile, int tile_size, int total) { return pair(vtk::tile_range(tile, tile_size, total)); });
  m.def("split_range",
        [=](int count, int splits, int split, int unit) { return pair(vtk::split_range(count, splits, split, unit)); });
  m.def("packed_row", [](int row, int group) {
    const vtk::PackedRow r = vtk::packed_row(row, group);
    return py::make_tuple(r.query, r.head);
  });
  m.def("row_of", [](int query, int head, int group) { return vtk::row_of({query, head}, group); });
  m.def("visible_keys", &vtk::visible_keys);
}

}  // namespace

PYBIND11_MODULE(simt_native, m) {
  bind_select(m);
  bind_reduce<float>(m);
  bind_reduce<int32_t>(m);
  bind_codes(m);
  bind_tensor(m);
  bind_random(m);
  bind_tile(m);
}
