//! Code that changes under the CPU's feet, and string instructions that stop halfway.
//!
//! A processor sees its own stores in the code it executes next, at the latest after a jump (SDM
//! vol. 3A 10.1.3: a taken branch or a serializing instruction stands between the store and the
//! new code); those of the family that x86-64 starts with see them at once, and a few lines here
//! say so (`at once`).
#![no_std]
#![no_main]

use core::arch::naked_asm;

use runtime::interrupts::catch;
use runtime::window::{self, PRESENT, WRITABLE};
use runtime::{cpu, println};

runtime::entry!(selfmod);

#[repr(C, align(4096))]
struct Pages([u8; 3 * 4096]);

/// Code that the program writes itself, and data for the string instructions.
static mut CODE: Pages = Pages([0; 3 * 4096]);
static mut FROM: Pages = Pages([0; 3 * 4096]);
static mut TO: Pages = Pages([0; 3 * 4096]);

/// `mov eax, NUMBER; ret`
fn constant(number: u32) -> [u8; 6] {
    let [a, b, c, d] = number.to_le_bytes();
    [0xB8, a, b, c, d, 0xC3]
}

fn selfmod() {
    window::open();
    rewritten_functions();
    rewritten_ahead();
    rewritten_in_a_loop();
    rewritten_through_another_address();
    remapped();
    across_two_pages();
    written_by_a_string_instruction();
    string_instructions();
    println!("selfmod: done");
}

fn code() -> *mut u8 {
    (&raw mut CODE) as *mut u8
}

/// Stores bytes at `to`, one at a time.
fn store(to: *mut u8, bytes: &[u8]) {
    for (index, &byte) in bytes.iter().enumerate() {
        // SAFETY: the callers stay inside CODE, or inside the window's pages of it.
        unsafe { to.add(index).write_volatile(byte) }
    }
}

/// Calls the code at `address`.
fn call(address: *const u8) -> u32 {
    // SAFETY: what was stored there ends with RET and changes EAX, ECX and EDX only.
    unsafe { core::mem::transmute::<*const u8, extern "C" fn() -> u32>(address)() }
}

/// Written, called, rewritten, called: a thousand times.
fn rewritten_functions() {
    let mut wrong = 0;
    for number in 0..1000 {
        store(code(), &constant(number));
        wrong += u32::from(call(code()) != number);
    }
    println!("rewritten 1000 times: {wrong} wrong");
    // Only the constant's third byte changes.
    store(code(), &constant(0));
    call(code());
    store(code().wrapping_add(3), &[7]);
    println!("one byte rewritten: {:#x}", call(code()));
    // A function that shares its page with what is written all the time.
    store(code(), &constant(5));
    let mut sum = 0;
    for round in 0..1000u32 {
        store(
            code().wrapping_add(0x800 + (round as usize & 0xFF)),
            &[round as u8],
        );
        sum += call(code());
    }
    println!("written next to, 1000 times: {sum}");
}

/// The store changes the instruction right behind it, or behind a jump.
fn rewritten_ahead() {
    #[unsafe(naked)]
    unsafe extern "C" fn next(_: u64) -> u64 {
        // mov byte ptr [rip + 1], 2 (over the constant of the next instruction)
        naked_asm!(
            "mov eax, 0",
            ".byte 0xC6, 0x05, 1, 0, 0, 0, 2",
            ".byte 0xB8, 1, 0, 0, 0", // mov eax, 1
            "ret"
        )
    }
    #[unsafe(naked)]
    unsafe extern "C" fn behind_a_jump(_: u64) -> u64 {
        naked_asm!(
            ".byte 0xC6, 0x05, 3, 0, 0, 0, 2",
            "jmp 2f",
            "2: .byte 0xB8, 1, 0, 0, 0",
            "ret"
        )
    }
    #[unsafe(naked)]
    unsafe extern "C" fn behind_cpuid(_: u64) -> u64 {
        naked_asm!(
            "push rbx",
            "mov byte ptr [rip + 2f + 1], 2",
            "xor eax, eax",
            "cpuid",
            "2: .byte 0xB8, 1, 0, 0, 0",
            "pop rbx",
            "ret"
        )
    }
    // The functions are in read-only memory only by name: the boot tables map all of it writable.
    for (what, body) in [
        (
            "behind a jump",
            behind_a_jump as unsafe extern "C" fn(u64) -> u64,
        ),
        ("behind cpuid", behind_cpuid),
        ("at once", next),
    ] {
        match catch(body, 0) {
            Ok(value) => println!("rewritten just ahead, {what}: {value}"),
            Err(fault) => println!(
                "rewritten just ahead, {what}: vector {}",
                fault.frame.vector
            ),
        }
    }
}

/// A loop that changes its own step: 1 + 2 + … + 10.
fn rewritten_in_a_loop() {
    #[unsafe(naked)]
    unsafe extern "C" fn body(_: u64) -> u64 {
        naked_asm!(
            "xor eax, eax",
            "mov ecx, 10",
            "mov byte ptr [rip + 2f + 1], 1",
            "jmp 2f",
            "2: .byte 0x05, 1, 0, 0, 0", // add eax, 1
            "inc byte ptr [rip + 2b + 1]",
            "dec ecx",
            "jnz 2b",
            "ret"
        )
    }
    for _ in 0..2 {
        println!(
            "a loop that changes its own step: {}",
            catch(body, 0).unwrap_or(0)
        );
    }
}

/// Executed at one address, written at another.
fn rewritten_through_another_address() {
    let executed = window::map(1, code() as u64, PRESENT);
    let written = window::map(2, code() as u64, PRESENT | WRITABLE);
    let mut wrong = 0;
    for number in 0..100 {
        store(written as *mut u8, &constant(number));
        wrong += u32::from(call(executed as *const u8) != number);
    }
    println!("rewritten through another address 100 times: {wrong} wrong");
}

/// The page under an address is another one.
fn remapped() {
    let pages = [code(), code().wrapping_add(4096)];
    store(pages[0], &constant(10));
    store(pages[1], &constant(11));
    let mut sum = 0;
    for round in 0..100 {
        let address = window::map(3, pages[round % 2] as u64, PRESENT);
        sum += call(address as *const u8);
    }
    println!("another page under the same address: {sum}");
    // And back with a page that changed while it was not mapped.
    let address = window::map(3, pages[0] as u64, PRESENT);
    call(address as *const u8);
    window::map(3, pages[1] as u64, PRESENT);
    store(pages[0], &constant(12));
    window::map(3, pages[0] as u64, PRESENT);
    println!(
        "changed while it was not mapped: {}",
        call(address as *const u8)
    );
    // The instruction `mov eax, 10` begins in one page and ends in another, which is
    // exchanged.
    store(pages[0].wrapping_add(4096 - 2), &[0xB8, 1]);
    store(pages[1], &[0, 0, 0, 0xC3]);
    let other = code().wrapping_add(2 * 4096);
    store(other, &[1, 0, 0, 0xC3]);
    let address = window::map(4, pages[0] as u64, PRESENT) + 4096 - 2;
    window::map(5, pages[1] as u64, PRESENT);
    let before = call(address as *const u8);
    window::map(5, other as u64, PRESENT);
    println!(
        "the second page of an instruction exchanged: {before:#x} {:#x}",
        call(address as *const u8)
    );
    window::unmap(5);
    match catch(fetch, address) {
        Ok(value) => println!("the second page of an instruction gone: {value:#x}"),
        Err(fault) => println!(
            "the second page of an instruction gone: error {:#x} rip +{:#x} cr2 +{:#x}",
            fault.frame.error,
            fault.frame.rip - window::BASE,
            fault.cr2 - window::BASE
        ),
    }
}

#[unsafe(naked)]
unsafe extern "C" fn fetch(address: u64) -> u64 {
    naked_asm!("jmp rdi")
}

/// An instruction across a page boundary, each of its bytes rewritten in turn.
fn across_two_pages() {
    for start in [4096 - 1, 4096 - 2, 4096 - 4] {
        let function = code().wrapping_add(start);
        store(function, &constant(0x1020304));
        let before = call(function);
        store(function, &constant(0x5060708));
        println!(
            "across two pages, {} bytes in the first: {before:#x} {:#x}",
            4096 - start,
            call(function)
        );
    }
    // Code that runs from one page into the next, which changes.
    let nops = [0x90; 16];
    store(code().wrapping_add(4096 - 16), &nops);
    store(code().wrapping_add(4096), &constant(1));
    let before = call(code().wrapping_add(4096 - 16));
    store(code().wrapping_add(4096), &constant(2));
    println!(
        "running into the next page: {before} {}",
        call(code().wrapping_add(4096 - 16))
    );
}

fn written_by_a_string_instruction() {
    for (length, number) in [(6, 21u32), (4096, 22)] {
        let source = (&raw mut FROM) as *mut u8;
        // SAFETY: inside FROM.
        unsafe { source.write_bytes(0x90, 4096) }
        store(source, &constant(number));
        // SAFETY: inside CODE; memcpy is REP MOVSB.
        unsafe { core::ptr::copy_nonoverlapping(source, code(), length) }
        println!("copied by rep movsb, {length} bytes: {}", call(code()));
    }
}

/// A string instruction on `[RSI, RDI, RCX]`. Returns what is left in RCX.
macro_rules! string_instruction {
    ($($name:ident: $($line:literal),*;)*) => {
        $(#[unsafe(naked)]
        unsafe extern "C" fn $name(pointers: u64) -> u64 {
            naked_asm!(
                "mov rsi, [rdi]",
                "mov rcx, [rdi + 16]",
                "mov rdi, [rdi + 8]",
                $($line,)*
                "mov rax, rcx",
                "ret"
            )
        })*
    };
}

string_instruction! {
    copy_bytes: "rep movsb";
    copy_dwords_backwards: "std", "rep movsd", "cld";
    fill: "mov eax, 0x5A5A5A5A", "rep stosq";
    compare: "repe cmpsb";
    find: "mov eax, 0x77", "repne scasb";
    // Port 0x3FB, the serial port's line control, reads the same every time.
    read_port: "mov edx, 0x3FB", "rep insb";
}

/// SDM vol. 2B REP: registers show the step that faulted, and the instruction can be resumed.
fn string_instructions() {
    let (from_frame, to_frame) = ((&raw mut FROM) as u64, (&raw mut TO) as u64);
    // SAFETY: both belong to this program.
    unsafe {
        for index in 0..3 * 4096 {
            ((&raw mut FROM) as *mut u8)
                .add(index)
                .write_volatile((index % 251) as u8 & 0x3F);
        }
        ((&raw mut TO) as *mut u8).write_bytes(0, 3 * 4096);
    }
    // Pages 0x10 to 0x12 of the window are FROM, 0x20 to 0x22 TO; the second of each is missing.
    let map = |first: usize, frame: u64, present: bool| {
        window::map(first, frame, PRESENT | WRITABLE);
        window::set_entry(
            first + 1,
            if present {
                (frame + 4096) | PRESENT | WRITABLE
            } else {
                0
            },
        );
        window::map(first + 2, frame + 2 * 4096, PRESENT | WRITABLE)
    };
    let from = window::BASE + 0x10 * 4096;
    let to = window::BASE + 0x20 * 4096;
    let show = |what: &str, body: unsafe extern "C" fn(u64) -> u64, pointers: [u64; 3]| match catch(
        body,
        &raw const pointers as u64,
    ) {
        Ok(value) => println!("{what}: done, {value:#x} left"),
        Err(fault) => {
            let frame = &fault.frame;
            println!(
                "{what}: vector {} error {:#x} cr2 +{:#x}, {:#x} left, rsi {:+}, rdi {:+}",
                frame.vector,
                frame.error,
                fault.cr2 - window::BASE,
                frame.rcx,
                (frame.rsi - pointers[0]) as i64,
                (frame.rdi - pointers[1]) as i64
            );
        }
    };
    map(0x10, from_frame, true);
    map(0x20, to_frame, false);
    show(
        "rep movsb, destination missing",
        copy_bytes,
        [from + 100, to + 0xF00, 0x1000],
    );
    println!(
        "copied before: {}",
        matches(from_frame + 100, to_frame + 0xF00, 0x100)
    );
    map(0x20, to_frame, true);
    show(
        "rep movsb again, all there",
        copy_bytes,
        [from + 100, to + 0xF00, 0x1000],
    );
    println!(
        "copied: {}",
        matches(from_frame + 100, to_frame + 0xF00, 0x1000)
    );

    map(0x10, from_frame, false);
    show(
        "rep movsb, source missing",
        copy_bytes,
        [from + 0xFF0, to, 0x100],
    );
    show(
        "rep movsb of nothing from there",
        copy_bytes,
        [from + 0x1000, to, 0],
    );
    show(
        "rep movsd backwards, source missing",
        copy_dwords_backwards,
        [from + 0x2010, to + 0x2000, 0x100],
    );
    map(0x10, from_frame, true);
    map(0x20, to_frame, false);
    // SAFETY: inside TO.
    unsafe { ((to_frame + 0x1000 - 4) as *mut u32).write_volatile(0x1234) }
    // Page 0x21 is missing: the ninth quadword would be the first in it, but for the 4 bytes that
    // the eighth has there.
    show(
        "rep stosq, across the boundary",
        fill,
        [0, to + 0x1000 - 60, 0x100],
    );
    println!("the bytes before the boundary: {:#x}", {
        // SAFETY: inside TO.
        unsafe { ((to_frame + 0x1000 - 4) as *const u32).read_volatile() }
    });
    show(
        "repe cmpsb, destination missing",
        compare,
        [from, to + 0x1000, 0x100],
    );
    show(
        "repne scasb, destination missing",
        find,
        [0, to + 0xFC0, 0x100],
    );
    show(
        "rep insb, destination missing",
        read_port,
        [0, to + 0xFF8, 0x10],
    );

    map(0x20, to_frame, true);
    // Overlapping by one byte: the first byte fills the rest.
    // SAFETY: inside TO.
    unsafe { (to_frame as *mut u8).write_volatile(0xAB) }
    show(
        "rep movsb onto itself, one further",
        copy_bytes,
        [to, to + 1, 0x1100],
    );
    // SAFETY: inside TO.
    let filled = (0..0x1101)
        .all(|index| unsafe { ((to_frame + index) as *const u8).read_volatile() } == 0xAB);
    println!("filled with the first byte: {}", u8::from(filled));
    show("repe cmpsb of equal bytes", compare, [to, to + 1, 0x100]);
    // SAFETY: inside TO.
    unsafe { ((to_frame + 0x40) as *mut u8).write_volatile(0x77) }
    show(
        "repe cmpsb up to the first difference",
        compare,
        [to, to + 1, 0x100],
    );
    show("repne scasb up to the byte", find, [0, to, 0x100]);

    // A handler that maps the page and returns: the instruction goes on where it was.
    runtime::interrupts::set_handler(14, |frame| {
        let page = (cpu::read_cr2() - window::BASE) / 4096;
        println!("page fault in page {page:#x}, {:#x} left", frame.rcx);
        let frame_address = if page < 0x20 {
            (&raw mut FROM) as u64 + (page - 0x10) * 4096
        } else {
            (&raw mut TO) as u64 + (page - 0x20) * 4096
        };
        window::map(page as usize, frame_address, PRESENT | WRITABLE);
    });
    map(0x10, from_frame, false);
    map(0x20, to_frame, false);
    show(
        "rep movsb, pages mapped on demand",
        copy_bytes,
        [from + 8, to, 0x2000],
    );
    println!("copied: {}", matches(from_frame + 8, to_frame, 0x2000));
    runtime::interrupts::clear_handler(14);
}

/// How many bytes are the same before the first that is not.
fn matches(left: u64, right: u64, length: u64) -> u64 {
    let byte = |address: u64| {
        // SAFETY: inside FROM and TO.
        unsafe { (address as *const u8).read_volatile() }
    };
    (0..length)
        .take_while(|index| byte(left + index) == byte(right + index))
        .count() as u64
}
