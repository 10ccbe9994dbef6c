//! Translator and interpreter run the same code from the same state and must agree in every register and
//! byte of memory.

mod costs;
mod crossing;
mod guest;
mod programs;
mod straight;
mod together;
mod x87;
