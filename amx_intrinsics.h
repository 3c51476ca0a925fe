/* Included before every C++ file of llama.cpp (see the Makefile). GCC declares of the AMX intrinsics neither that a tile
   is loaded from memory nor that the tile configuration has 64 bytes, and therefore removes or moves the stores to them. */
#if defined(__AMX_TILE__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg\t%0" ::"m"(*(const char(*)[64])(config)))
#undef _tile_loadd
#define _tile_loadd(tile, base, stride) COGUMI_TILE_LOADD(tile, base, stride)
#define COGUMI_TILE_LOADD(tile, base, stride)            \
  __asm__ volatile("tileloadd\t(%0,%1,1), %%tmm" #tile \
                   ::"r"((const void*)(base)), "r"((long)(stride)) : "memory")
#endif
