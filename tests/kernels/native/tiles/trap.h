#pragma once

void trap_tile_instructions();
bool tiles_are_released();
long trapped_instructions();
