//! Translator and interpreter run the same code from the same state and must agree in every register and
//! byte of memory.

mod calls;
mod costs;
mod crossing;
mod devices;
mod edges;
mod guest;
mod levels;
mod programs;
mod straight;
mod together;
mod undefined;
mod x87;
