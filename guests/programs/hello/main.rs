//! The built-in guest: says hello, reads a line, computes, powers off.
#![no_std]
#![no_main]

mod expression;

use expression::ExpressionError;
use runtime::{boot_info, cpu, print, println, serial};

runtime::entry!(hello);

const LARGEST_PRIME_LIMIT: usize = 10_000_000;

fn hello() {
    println!("hello from trapgate's built-in guest");
    print!("cpu: {}", cpu::vendor().as_str());
    match cpu::brand() {
        Some(brand) => println!(", {}", brand.as_str()),
        None => println!(),
    }
    match boot_info::usable_memory() {
        Some((bytes, ranges)) => println!("memory: {} MiB usable, in {ranges} ranges", bytes >> 20),
        None => println!("memory: not told"),
    }
    println!("booted by: {}", boot_info::protocol().name());
    if !boot_info::command_line().is_empty() {
        println!("command line: {}", boot_info::command_line());
    }
    println!("type an expression such as 6 * (3 + 4), or help");

    let mut buffer = [0; 72];
    loop {
        print!("> ");
        let Some(line) = serial::read_line(&mut buffer) else {
            break;
        };
        if answer(line.trim()) {
            break;
        }
    }
    println!("goodbye");
}

/// Answers one line. False if the person should try again.
fn answer(line: &str) -> bool {
    match line.split_once(' ').unwrap_or((line, "")) {
        ("" | "quit" | "exit", "") => true,
        ("help", "") => {
            println!("  6 * (3 + 4)   any integers with + - * / and parentheses");
            println!("  primes N      how many primes there are up to N");
            println!("  quit          or an empty line: power off at once");
            false
        }
        ("primes", limit) => match limit.trim().parse() {
            Ok(limit) if limit <= LARGEST_PRIME_LIMIT => {
                println!("{}", count_primes(limit));
                true
            }
            _ => {
                println!("error: primes takes a number from 0 to {LARGEST_PRIME_LIMIT}");
                false
            }
        },
        _ => match expression::evaluate(line) {
            Ok(value) => {
                println!("{value}");
                true
            }
            Err(error) => {
                explain(&error);
                false
            }
        },
    }
}

fn explain(error: &ExpressionError) {
    let (what, at) = match error {
        ExpressionError::Unexpected { at } => ("a number or an operator is missing", at),
        ExpressionError::TooLarge { at } => ("this does not fit into 64 bits", at),
        ExpressionError::DivisionByZero { at } => ("division by zero", at),
        ExpressionError::TooDeep { at } => ("too many parentheses inside each other", at),
    };
    // Under the prompt and the line, the caret points at the place.
    println!("  {:at$}^ {what}", "", at = *at);
    println!("try again, or help");
}

/// The sieve of Eratosthenes, one bit for each odd number.
fn count_primes(limit: usize) -> usize {
    static mut COMPOSITE: [u64; LARGEST_PRIME_LIMIT / 128 + 1] = [0; LARGEST_PRIME_LIMIT / 128 + 1];
    // SAFETY: the only use, once at a time.
    let composite = unsafe { &mut *(&raw mut COMPOSITE) };
    composite.fill(0);
    if limit < 2 {
        return 0;
    }
    let mut count = 1; // 2, the one that is not odd
    for number in (3..=limit).step_by(2) {
        if composite[number / 128] & 1 << (number / 2 % 64) != 0 {
            continue;
        }
        count += 1;
        for multiple in (number * number..=limit).step_by(number * 2) {
            composite[multiple / 128] |= 1 << (multiple / 2 % 64);
        }
    }
    count
}
