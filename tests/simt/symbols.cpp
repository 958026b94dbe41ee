// Names for reports, from this library's own symbol table and, for lines, from addr2line. The symbol table also
// tells where each static shared object lies.
#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <link.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <iterator>

#include "runtime.h"

namespace simt {
namespace {

struct Function {
  size_t offset, bytes;
  std::string name;
};

struct Library {
  std::string path;
  char* base = nullptr;
  std::vector<Function> functions;
  std::vector<SharedObject> objects;
};

std::string demangled(const char* name) {
  int status = 0;
  char* plain = abi::__cxa_demangle(name, nullptr, nullptr, &status);
  std::string out = status == 0 ? plain : name;
  free(plain);
  for (std::string noise : {"(anonymous namespace)::"})
    for (size_t at; (at = out.find(noise)) != std::string::npos;) out.erase(at, noise.size());
  return out;
}

Library read_library() {
  Library library;
  Dl_info info;
  if (!dladdr(reinterpret_cast<void*>(&read_library), &info)) return library;
  library.path = info.dli_fname;
  library.base = static_cast<char*>(info.dli_fbase);
  std::ifstream file(library.path, std::ios::binary);
  const std::string bytes((std::istreambuf_iterator<char>(file)), {});
  const auto* header = reinterpret_cast<const ElfW(Ehdr)*>(bytes.data());
  const auto* sections = reinterpret_cast<const ElfW(Shdr)*>(bytes.data() + header->e_shoff);
  for (int s = 0; s < header->e_shnum; ++s) {
    if (sections[s].sh_type != SHT_SYMTAB) continue;
    const char* names = bytes.data() + sections[sections[s].sh_link].sh_offset;
    const auto* symbols = reinterpret_cast<const ElfW(Sym)*>(bytes.data() + sections[s].sh_offset);
    for (size_t i = 0; i < sections[s].sh_size / sizeof(ElfW(Sym)); ++i) {
      const ElfW(Sym) & symbol = symbols[i];
      const char* name = names + symbol.st_name;
      if (symbol.st_shndx == SHN_UNDEF) continue;
      if (ELF64_ST_TYPE(symbol.st_info) == STT_FUNC)
        library.functions.push_back({symbol.st_value, symbol.st_size, name});
      // A guard of an initialiser is not shared memory. It is poisoned like the rest, so that nothing is initialised,
      // as on a device.
      if (ELF64_ST_TYPE(symbol.st_info) == STT_TLS && std::strncmp(name, "_ZGV", 4) != 0)
        library.objects.push_back(
            {demangled(name), symbol.st_value, symbol.st_size, std::strstr(name, "simt_redzone") != nullptr, false});
    }
  }
  return library;
}

Library& library() {
  static Library instance = read_library();
  return instance;
}

}  // namespace

std::vector<SharedObject>& shared_objects() { return library().objects; }

uint32_t code_offset(const void* address) {
  return static_cast<uint32_t>(static_cast<const char*>(address) - library().base);
}

std::string function_name(const void* address) {
  const size_t offset = static_cast<const char*>(address) - library().base;
  for (const Function& f : library().functions)
    if (offset >= f.offset && offset < f.offset + f.bytes) return demangled(f.name.c_str());
  return "at an unknown address";
}

// "radix_select.cuh:33 < prune_gather.cu:214": the line, then the line it was inlined into last.
std::string source_line(uint32_t code) {
  char command[4096], line[1024];
  // The return address is the instruction after the call.
  snprintf(command, sizeof command, "addr2line -i -e '%s' 0x%x 2>/dev/null", library().path.c_str(), code - 1);
  std::vector<std::string> chain;
  if (FILE* pipe = popen(command, "r")) {
    while (fgets(line, sizeof line, pipe)) {
      std::string place = line;
      place = place.substr(place.rfind('/') + 1);
      place = place.substr(0, place.find_first_of(" \n"));
      if (place.find('?') == std::string::npos) chain.push_back(place);
    }
    pclose(pipe);
  }
  if (chain.empty()) return "code offset " + std::to_string(code);
  return chain.size() == 1 ? chain[0] : chain.front() + " < " + chain.back();
}

}  // namespace simt
