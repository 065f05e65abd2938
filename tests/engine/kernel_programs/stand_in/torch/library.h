// Stands in for torch's registration of operators, which a program that calls them as functions does without.
#pragma once

struct StandInLibrary {
  template <typename... Parts>
  void def(Parts...) {}
  template <typename... Parts>
  void impl(Parts...) {}
};

#define STAND_IN_NAME_(line) stand_in_##line
#define STAND_IN_NAME(line) STAND_IN_NAME_(line)
#define TORCH_LIBRARY(space, library) [[maybe_unused]] static void STAND_IN_NAME(__COUNTER__)(StandInLibrary & library)
#define TORCH_LIBRARY_FRAGMENT(space, library) TORCH_LIBRARY(space, library)
#define TORCH_LIBRARY_IMPL(space, device, library) TORCH_LIBRARY(space, library)
