"""Text tasks: readers, descriptions, generated tasks, collections."""

import dataclasses
import json
import os
import pathlib
import pickle
import re

import grain
import pytest
import tensorflow_datasets as tfds
import yaml
from ml_collections import ConfigDict

from configs.t2l import HELD_OUT
from configs.t2l import get_config as t2l_config
from hyperlora.errors import UserError
from t2l import benchmarks, collections, generated, records, tasks
from t2l.collections import SAME_TASK, collect
from t2l.tasks import Example

# Worked by hand: task | input | output.
WORKED = """
uppercase | river | RIVER
uppercase | go | GO
capitalize_word | river | River
capitalize_word | ant | Ant
first_letter | garden | g
first_letter | owl | o
last_letter | garden | n
last_letter | owl | l
first_three_letters | garden | gar
first_three_letters | owl | owl
drop_first_letter | garden | arden
drop_first_letter | owl | wl
drop_last_letter | garden | garde
drop_last_letter | owl | ow
count_letters | garden | 6
count_letters | strawberry | 10
count_vowels | strawberry | 2
count_vowels | eagle | 3
remove_vowels | strawberry | strwbrry
remove_vowels | eagle | gl
reverse_letters | garden | nedrag
reverse_letters | owl | lwo
spell_with_hyphens | owl | o-w-l
spell_with_hyphens | moth | m-o-t-h
pig_latin | glove | oveglay
pig_latin | apple | appleway
first_word | red fox jumps | red
first_word | pen ink | pen
second_word | red fox jumps | fox
second_word | pen ink | ink
last_word | red fox jumps | jumps
last_word | pen ink paper | paper
longest_word | red fox jumps | jumps
longest_word | elephant ant bee | elephant
shortest_word | green ox jumps | ox
shortest_word | a bull cow | a
count_words | red fox jumps | 3
count_words | one two three four five | 5
reverse_words | red fox jumps | jumps fox red
reverse_words | a b c d | d c b a
sort_words | red fox jumps | fox jumps red
sort_words | pan pen ant | ant pan pen
drop_first_word | red fox jumps | fox jumps
drop_first_word | a b c d | b c d
swap_first_and_last_word | red fox jumps | jumps fox red
swap_first_and_last_word | a b c d | d b c a
acronym | red fox jumps | RFJ
acronym | light gray old hat | LGOH
snake_case | red fox jumps | red_fox_jumps
snake_case | pen ink | pen_ink
repeated_word | pen, fox, owl, fox | fox
repeated_word | owl, owl, pen, cup | owl
remove_repetition | pen, fox, owl, fox | pen, fox, owl
remove_repetition | owl, owl, pen, cup | owl, pen, cup
pick_animal | taxi, plum, nurse, horse, shirt | horse
pick_animal | owl, train, lemon, scarf, judge | owl
pick_fruit | taxi, plum, nurse, horse, shirt | plum
pick_fruit | owl, train, lemon, scarf, judge | lemon
pick_vehicle | taxi, plum, nurse, horse, shirt | taxi
pick_vehicle | owl, train, lemon, scarf, judge | train
pick_garment | taxi, plum, nurse, horse, shirt | shirt
pick_garment | owl, train, lemon, scarf, judge | scarf
pick_job | taxi, plum, nurse, horse, shirt | nurse
pick_job | owl, train, lemon, scarf, judge | judge
is_animal | horse | yes
is_animal | hammer | no
kind_of_thing | elbow | body part
kind_of_thing | dentist | job
plural | mouse | mice
plural | berry | berries
with_article | owl | an owl
with_article | uniform | a uniform
count_with_noun | 1 x knife | 1 knife
count_with_noun | 4 x knife | 4 knives
count_in_words_with_noun | 1 x fox | one fox
count_in_words_with_noun | 12 x goose | twelve geese
past_tense | carry | carried
past_tense | swim | swam
past_tense | hug | hugged
ing_form | swim | swimming
ing_form | make | making
ing_form | tie | tying
third_person | carry | carries
third_person | watch | watches
third_person | play | plays
comparative | big | bigger
comparative | easy | easier
comparative | wise | wiser
superlative | big | biggest
superlative | easy | easiest
superlative | cheap | cheapest
adverb | gentle | gently
adverb | easy | easily
adverb | safe | safely
sentence_subject | The fox sees the nurse. | fox
sentence_subject | The judge teaches the owl. | judge
sentence_object | The fox sees the nurse. | nurse
sentence_object | The judge teaches the owl. | owl
sentence_to_past | The fox sees the nurse. | The fox saw the nurse.
sentence_to_past | The judge teaches the owl. | The judge taught the owl.
sentence_to_future | The fox sees the nurse. | The fox will see the nurse.
sentence_to_future | The judge teaches the owl. | The judge will teach the owl.
sentence_to_negation | The fox sees the nurse. | The fox does not see the nurse.
sentence_to_negation | The judge teaches the owl. | The judge does not teach the owl.
sentence_to_question | The fox sees the nurse. | Does the fox see the nurse?
sentence_to_question | The judge teaches the owl. | Does the judge teach the owl?
sentence_to_passive | The fox sees the nurse. | The nurse is seen by the fox.
sentence_to_passive | The judge teaches the owl. | The owl is taught by the judge.
swap_subject_and_object | The fox sees the nurse. | The nurse sees the fox.
swap_subject_and_object | The judge teaches the owl. | The owl teaches the judge.
given_name | Ada Stone | Ada
given_name | Leo Ward | Leo
surname | Ada Stone | Stone
surname | Leo Ward | Ward
initials | Ada Stone | A.S.
initials | Leo Ward | L.W.
surname_first | Ada Stone | Stone, Ada
surname_first | Leo Ward | Ward, Leo
email_address | Ada Stone | ada.stone@example.com
email_address | Leo Ward | leo.ward@example.com
user_name | Ada Stone | astone
user_name | Leo Ward | lward
file_extension | /home/leo/plan.txt | txt
file_extension | /srv/ada/song.mp3 | mp3
file_stem | /home/leo/plan.txt | plan
file_stem | /srv/ada/song.mp3 | song
containing_folder | /home/leo/plan.txt | leo
containing_folder | /srv/ada/song.mp3 | ada
largest_number | 7, 30, 12 | 30
largest_number | 99, 8, 45, 61 | 99
smallest_number | 7, 30, 12 | 7
smallest_number | 99, 8, 45, 61 | 8
first_number | 7, 30, 12 | 7
first_number | 99, 8, 45, 61 | 99
sort_ascending | 7, 30, 12 | 7, 12, 30
sort_ascending | 99, 8, 45, 61 | 8, 45, 61, 99
sort_descending | 7, 30, 12 | 30, 12, 7
sort_descending | 99, 8, 45, 61 | 99, 61, 45, 8
even_numbers | 7, 30, 12 | 30, 12
even_numbers | 99, 8, 45, 61 | 8
odd_numbers | 7, 30, 12 | 7
odd_numbers | 99, 8, 45, 61 | 99, 45, 61
sum_of_pair | 7 and 30 | 37
sum_of_pair | 48 and 5 | 53
difference_of_pair | 7 and 30 | 23
difference_of_pair | 48 and 5 | 43
larger_of_pair | 7 and 30 | 30
larger_of_pair | 48 and 5 | 48
comparison_sign | 7 and 30 | <
comparison_sign | 48 and 5 | >
next_term | 5, 9, 13, 17 | 21
next_term | 90, 91, 92, 93 | 94
step_of_progression | 5, 9, 13, 17 | 4
step_of_progression | 90, 91, 92, 93 | 1
successor | 199 | 200
successor | 10 | 11
predecessor | 200 | 199
predecessor | 11 | 10
last_digit | 340 | 0
last_digit | 57 | 7
ordinal_suffix | 22 | 22nd
ordinal_suffix | 113 | 113th
roman_numeral | 49 | XLIX
roman_numeral | 198 | CXCVIII
number_in_french | 80 | quatre-vingts
number_in_french | 16 | seize
number_in_german | 21 | einundzwanzig
number_in_german | 60 | sechzig
number_in_spanish | 16 | dieciséis
number_in_spanish | 45 | cuarenta y cinco
number_in_english | 16 | sixteen
number_in_english | 105 | one hundred and five
year_of_date | 2021-03-05 | 2021
year_of_date | 1960-12-24 | 1960
day_of_date | 2021-03-05 | 5
day_of_date | 1960-12-24 | 24
month_of_date | 2021-03-05 | March
month_of_date | 1960-12-24 | December
american_date | 2021-03-05 | 03/05/2021
american_date | 1960-12-24 | 12/24/1960
date_in_english | 2021-03-05 | March 5, 2021
date_in_english | 1960-12-24 | December 24, 1960
month_of_date_in_french | 2021-08-05 | août
month_of_date_in_french | 1960-12-24 | décembre
next_weekday | Sunday, 9 May | Monday
next_weekday | Thursday, 1 January | Friday
previous_weekday | Monday, 9 May | Sunday
previous_weekday | Thursday, 1 January | Wednesday
weekday_in_french | Sunday, 9 May | dimanche
weekday_in_french | Thursday, 1 January | jeudi
weekday_in_german | Sunday, 9 May | Sonntag
weekday_in_german | Thursday, 1 January | Donnerstag
is_weekend | Saturday, 9 May | yes
is_weekend | Thursday, 1 January | no
next_month | Sunday, 9 May | June
next_month | Thursday, 1 December | January
previous_month | Sunday, 9 May | April
previous_month | Thursday, 1 January | December
twelve_hour_clock | 00:05 | 12:05 AM
twelve_hour_clock | 17:40 | 5:40 PM
hour_of_time | 00:05 | 0
hour_of_time | 17:40 | 17
minutes_of_time | 00:05 | 05
minutes_of_time | 17:40 | 40
am_or_pm | 00:05 | AM
am_or_pm | 12:00 | PM
one_hour_later | 23:05 | 00:05
one_hour_later | 17:40 | 18:40
part_of_day | 05:59 | night
part_of_day | 18:00 | evening
country_code | Switzerland | CH
country_code | Spain | ES
currency_code_of_country | Japan | JPY
currency_code_of_country | Spain | EUR
country_in_french | Germany | Allemagne
country_in_french | Spain | Espagne
country_in_german | France | Frankreich
country_in_german | Spain | Spanien
language_code | German | de
language_code | Welsh | cy
language_in_french | German | allemand
language_in_french | Welsh | gallois
currency_code | Swiss Franc | CHF
currency_code | Japanese Yen | JPY
second_letter | garden | a
second_letter | owl | w
third_letter | garden | r
third_letter | owl | l
capital_third_letter | garden | R
capital_third_letter | owl | L
capital_first_two_letters | garden | GA
capital_first_two_letters | owl | OW
capital_last_two_letters | garden | EN
capital_last_two_letters | owl | WL
last_two_letters | garden | en
last_two_letters | owl | wl
drop_first_two_letters | garden | rden
drop_first_two_letters | owl | l
drop_last_two_letters | garden | gard
drop_last_two_letters | owl | o
drop_second_letter | garden | grden
drop_second_letter | owl | ol
drop_first_and_last_letter | garden | arde
drop_first_and_last_letter | owl | w
double_last_letter | garden | gardenn
double_last_letter | owl | owll
swap_first_two_letters | garden | agrden
swap_first_two_letters | owl | wol
star_for_vowels | garden | g*rd*n
star_for_vowels | fry | fry
hyphen_after_first_letter | garden | g-arden
hyphen_after_first_letter | owl | o-wl
count_consonants | garden | 4
count_consonants | eagle | 2
repeat_word | garden | garden garden
repeat_word | owl | owl owl
drop_last_word | red fox jumps | red fox
drop_last_word | a b c d | a b c
first_and_last_word | red fox jumps | red jumps
first_and_last_word | a b c d | a d
second_to_last_word | red fox jumps | fox
second_to_last_word | a b c d | c
length_of_longest_word | red fox jumps | 5
length_of_longest_word | elephant ant bee | 8
title_case | red fox jumps | Red Fox Jumps
title_case | pen ink | Pen Ink
alphabetically_second_of_3 | pen, ant, fox | fox
alphabetically_second_of_3 | cap, cat, car | car
first_and_last_of_3 | pen, ant, fox | pen, fox
first_and_last_of_3 | cap, cat, car | cap, car
reverse_list_of_3 | pen, ant, fox | fox, ant, pen
reverse_list_of_3 | cap, cat, car | car, cat, cap
choose_second_of_4 | pen, ant, fox, jar | ant
choose_second_of_4 | owl, cap, plum, axe | cap
choose_third_of_4 | pen, ant, fox, jar | fox
choose_third_of_4 | owl, cap, plum, axe | plum
alphabetically_first_of_4 | pen, ant, fox, jar | ant
alphabetically_first_of_4 | owl, cap, plum, axe | axe
choose_second_of_5 | pen, ant, fox, jar, hat | ant
choose_second_of_5 | owl, cap, plum, axe, lip | cap
choose_fourth_of_5 | pen, ant, fox, jar, hat | jar
choose_fourth_of_5 | owl, cap, plum, axe, lip | axe
choose_last_of_5 | pen, ant, fox, jar, hat | hat
choose_last_of_5 | owl, cap, plum, axe, lip | lip
first_and_last_of_5 | pen, ant, fox, jar, hat | pen, hat
first_and_last_of_5 | owl, cap, plum, axe, lip | owl, lip
position_of_animal | taxi, plum, nurse, horse, shirt | 4
position_of_animal | owl, train, lemon, scarf, judge | 1
position_of_fruit | taxi, plum, nurse, horse, shirt | 2
position_of_fruit | owl, train, lemon, scarf, judge | 3
pick_animal_and_job | taxi, plum, nurse, horse, shirt | horse and nurse
pick_animal_and_job | owl, train, lemon, scarf, judge | owl and judge
mixture_without_animal | taxi, plum, nurse, horse, shirt | taxi, plum, nurse, shirt
mixture_without_animal | owl, train, lemon, scarf, judge | train, lemon, scarf, judge
pick_body_part | knee, spoon, brave, Leo, May, six | knee
pick_body_part | two, Nina, June, chin, lamp, odd | chin
pick_object | knee, spoon, brave, Leo, May, six | spoon
pick_object | two, Nina, June, chin, lamp, odd | lamp
pick_adjective | knee, spoon, brave, Leo, May, six | brave
pick_adjective | two, Nina, June, chin, lamp, odd | odd
pick_given_name | knee, spoon, brave, Leo, May, six | Leo
pick_given_name | two, Nina, June, chin, lamp, odd | Nina
pick_month | knee, spoon, brave, Leo, May, six | May
pick_month | two, Nina, June, chin, lamp, odd | June
pick_number_word | knee, spoon, brave, Leo, May, six | six
pick_number_word | two, Nina, June, chin, lamp, odd | two
animal_among_colors_3 | red, fox, blue | fox
animal_among_colors_3 | pink, gray, owl | owl
animal_among_verbs_3 | sing, fox, wait | fox
animal_among_verbs_3 | eat, jump, owl | owl
animal_among_adjectives_5 | calm, fox, odd, rich, wise | fox
animal_among_adjectives_5 | mild, deep, warm, owl, soft | owl
animal_among_vehicles_5 | bus, fox, tram, van, car | fox
animal_among_vehicles_5 | taxi, raft, ship, owl, jeep | owl
fruit_among_objects_3 | spoon, plum, lamp | plum
fruit_among_objects_3 | fig, bed, key | fig
fruit_among_vehicles_5 | bus, plum, tram, van, car | plum
fruit_among_vehicles_5 | taxi, raft, ship, fig, jeep | fig
garment_among_animals_3 | fox, shirt, owl | shirt
garment_among_animals_3 | hat, bee, cow | hat
garment_among_jobs_5 | nurse, shirt, judge, poet, clerk | shirt
garment_among_jobs_5 | pilot, baker, miner, hat, tailor | hat
job_among_animals_3 | fox, nurse, owl | nurse
job_among_animals_3 | judge, bee, cow | judge
job_among_verbs_5 | sing, nurse, wait, eat, jump | nurse
job_among_verbs_5 | pay, rain, win, judge, dig | judge
body_part_among_animals_3 | fox, knee, owl | knee
body_part_among_animals_3 | chin, bee, cow | chin
body_part_among_fruits_5 | plum, knee, fig, pear, lime | knee
body_part_among_fruits_5 | kiwi, melon, apple, chin, guava | chin
object_among_animals_3 | fox, spoon, owl | spoon
object_among_animals_3 | lamp, bee, cow | lamp
object_among_adjectives_5 | calm, spoon, odd, rich, wise | spoon
object_among_adjectives_5 | mild, deep, warm, lamp, soft | lamp
adjective_among_animals_3 | fox, brave, owl | brave
adjective_among_animals_3 | odd, bee, cow | odd
adjective_among_animals_5 | fox, brave, owl, bee, cow | brave
adjective_among_animals_5 | cat, dog, hen, odd, pig | odd
adjective_among_objects_3 | spoon, brave, lamp | brave
adjective_among_objects_3 | odd, bed, key | odd
given_name_among_countries_3 | Spain, Leo, Cuba | Leo
given_name_among_countries_3 | Nina, Peru, Mali | Nina
country_among_languages_3 | Welsh, Spain, Danish | Spain
country_among_languages_3 | Peru, Latin, Thai | Peru
country_among_animals_5 | fox, Spain, owl, bee, cow | Spain
country_among_animals_5 | cat, dog, hen, Peru, pig | Peru
language_among_countries_5 | Spain, Welsh, Cuba, Mali, Togo | Welsh
language_among_countries_5 | Peru, Iraq, Oman, Thai, Fiji | Thai
month_among_weekdays_3 | Sunday, May, Friday | May
month_among_weekdays_3 | June, Monday, Tuesday | June
weekday_among_months_5 | May, Sunday, June, July, March | Sunday
weekday_among_months_5 | April, August, October, Friday, May | Friday
number_word_among_animals_3 | fox, six, owl | six
number_word_among_animals_3 | two, bee, cow | two
number_word_among_adjectives_5 | calm, six, odd, rich, wise | six
number_word_among_adjectives_5 | mild, deep, warm, two, soft | two
adverb_among_adjectives_3 | calm, bravely, rich | bravely
adverb_among_adjectives_3 | easily, deep, warm | easily
comparative_among_adjectives_3 | calm, braver, clever | braver
comparative_among_adjectives_3 | easier, deep, warm | easier
progressive_of_verb | swim | is swimming
progressive_of_verb | tie | is tying
comparative_with_than | big | bigger than
comparative_with_than | easy | easier than
as_adjective_as | big | as big as
as_adjective_as | easy | as easy as
less_adjective | big | less big
less_adjective | easy | less easy
sentence_verb | The fox sees the nurse. | sees
sentence_verb | The judge teaches the owl. | teaches
sentence_verb_in_past | The fox sees the nurse. | saw
sentence_verb_in_past | The judge teaches the owl. | taught
sentence_to_perfect | The fox sees the nurse. | The fox has seen the nurse.
sentence_to_perfect | The judge teaches the owl. | The judge has taught the owl.
sentence_to_past_perfect | The fox sees the nurse. | The fox had seen the nurse.
sentence_to_past_perfect | The judge teaches the owl. | The judge had taught the owl.
sentence_to_progressive | The fox chases the nurse. | The fox is chasing the nurse.
sentence_to_progressive | The judge teaches the owl. | The judge is teaching the owl.
sentence_to_past_passive | The fox sees the nurse. | The nurse was seen by the fox.
sentence_to_past_passive | The judge teaches the owl. | The owl was taught by the judge.
sentence_with_must | The fox sees the nurse. | The fox must see the nurse.
sentence_with_must | The judge teaches the owl. | The judge must teach the owl.
sentence_with_can | The fox sees the nurse. | The fox can see the nurse.
sentence_with_can | The judge teaches the owl. | The judge can teach the owl.
sentence_with_wants_to | The fox sees the nurse. | The fox wants to see the nurse.
sentence_with_wants_to | The judge teaches the owl. | The judge wants to teach the owl.
sentence_to_past_negation | The fox sees the nurse. | The fox did not see the nurse.
sentence_to_past_negation | The judge teaches the owl. | The judge did not teach the owl.
sentence_to_past_question | The fox sees the nurse. | Did the fox see the nurse?
sentence_to_past_question | The judge teaches the owl. | Did the judge teach the owl?
sentence_to_who_question | The fox sees the nurse. | Who sees the nurse?
sentence_to_who_question | The judge teaches the owl. | Who teaches the owl?
sentence_with_plural_subject | The fox sees the nurse. | The foxes see the nurse.
sentence_with_plural_subject | The goose teaches the owl. | The geese teach the owl.
surname_initial | Ada Stone | S
surname_initial | Leo Ward | W
abbreviated_given_name | Ada Stone | A. Stone
abbreviated_given_name | Leo Ward | L. Ward
abbreviated_surname | Ada Stone | Ada S.
abbreviated_surname | Leo Ward | Leo W.
letter_greeting | Ada Stone | Dear Ada,
letter_greeting | Leo Ward | Dear Leo,
lowercase_name | Ada Stone | ada stone
lowercase_name | Leo Ward | leo ward
top_folder | /home/leo/plan.txt | home
top_folder | /srv/ada/song.mp3 | srv
file_name | /home/leo/plan.txt | plan.txt
file_name | /srv/ada/song.mp3 | song.mp3
second_number | 7, 30, 12 | 30
second_number | 99, 8, 45, 61 | 8
last_number | 7, 30, 12 | 12
last_number | 99, 8, 45, 61 | 61
second_largest_number | 7, 30, 12 | 12
second_largest_number | 99, 8, 45, 61 | 61
second_smallest_number | 7, 30, 12 | 12
second_smallest_number | 99, 8, 45, 61 | 45
first_odd_number | 7, 30, 12 | 7
first_odd_number | 8, 45, 61, 99 | 45
range_of_numbers | 7, 30, 12 | 23
range_of_numbers | 99, 8, 45, 61 | 91
count_even_numbers | 7, 30, 12 | 2
count_even_numbers | 99, 8, 45, 61 | 1
reverse_numbers | 7, 30, 12 | 12, 30, 7
reverse_numbers | 99, 8, 45, 61 | 61, 45, 8, 99
increment_each | 7, 30, 12 | 8, 31, 13
increment_each | 99, 8, 45, 61 | 100, 9, 46, 62
double_each | 7, 30, 12 | 14, 60, 24
double_each | 99, 8, 45, 61 | 198, 16, 90, 122
first_digit | 340 | 3
first_digit | 57 | 5
number_in_italian | 21 | ventuno
number_in_italian | 60 | sessanta
number_in_italian | 123 | centoventitré
number_in_italian | 3 | tre
number_in_dutch | 21 | eenentwintig
number_in_dutch | 60 | zestig
number_in_portuguese | 21 | vinte e um
number_in_portuguese | 60 | sessenta
number_in_swedish | 21 | tjugoett
number_in_swedish | 60 | sextio
ordinal_in_words | 21 | twenty-first
ordinal_in_words | 60 | sixtieth
month_of_date_in_german | 2021-03-05 | März
month_of_date_in_german | 1960-12-24 | Dezember
month_of_date_in_italian | 2021-08-05 | agosto
month_of_date_in_italian | 1960-12-24 | dicembre
month_number | 2021-03-05 | 3
month_number | 1960-12-24 | 12
ordinal_day_of_date | 2021-03-05 | 5th
ordinal_day_of_date | 1960-12-22 | 22nd
weekday_of_day | Sunday, 9 May | Sunday
weekday_of_day | Thursday, 1 January | Thursday
month_of_day | Sunday, 9 May | May
month_of_day | Thursday, 1 January | January
two_weekdays_later | Sunday, 9 May | Tuesday
two_weekdays_later | Thursday, 1 January | Saturday
two_months_later | Sunday, 9 May | July
two_months_later | Thursday, 1 December | February
two_months_earlier | Sunday, 9 May | March
two_months_earlier | Thursday, 1 January | November
three_months_later | Sunday, 9 May | August
three_months_later | Thursday, 1 December | March
weekday_in_italian | Sunday, 9 May | domenica
weekday_in_italian | Thursday, 1 January | giovedì
weekday_in_spanish | Sunday, 9 May | domingo
weekday_in_spanish | Thursday, 1 January | jueves
weekday_in_dutch | Sunday, 9 May | zondag
weekday_in_dutch | Thursday, 1 January | donderdag
weekday_in_swedish | Sunday, 9 May | söndag
weekday_in_swedish | Thursday, 1 January | torsdag
two_hours_later | 22:05 | 00:05
two_hours_later | 17:40 | 19:40
one_hour_earlier | 00:05 | 23:05
one_hour_earlier | 17:40 | 16:40
half_an_hour_later | 23:35 | 00:05
half_an_hour_later | 17:10 | 17:40
hour_on_twelve_hour_clock | 00:05 | 12
hour_on_twelve_hour_clock | 17:40 | 5
minutes_to_next_hour | 00:05 | 55
minutes_to_next_hour | 17:00 | 60
country_in_spanish | Germany | Alemania
country_in_spanish | France | Francia
country_in_italian | Germany | Germania
country_in_italian | France | Francia
language_in_german | German | Deutsch
language_in_german | Welsh | Walisisch
language_in_italian | German | tedesco
language_in_italian | Welsh | gallese
"""
ROWS = [tuple(line.split(' | ')) for line in WORKED.strip().splitlines()]


def shared_tasks():
    """The folder of JSON tasks: $HYPERLORA_TASKS, or shared/data/tasks beside the checkout."""
    places = [pathlib.Path(os.environ.get('HYPERLORA_TASKS', 'nowhere'))]
    places += [parent / 'shared/data/tasks' for parent in pathlib.Path(__file__).parents]
    found = next((str(place) for place in places if place.is_dir()), None)
    return found or pytest.skip('no folder of JSON tasks; set HYPERLORA_TASKS')


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def examples(*pairs):
    return [{'input': a, 'output': b} for a, b in pairs]


def json_task(**changes):
    task = {
        'name': 'opposites',
        'source': 'made up',
        'license': 'MIT',
        'descriptions': ['Say the opposite.', 'Negate.', 'Invert.', 'Contrary?'],
        'train': examples(('up', 'down'), ('left', ['right', 'right-hand'])),
        'test': examples(('in', 'out')),
    }
    return {key: value for key, value in (task | changes).items() if value is not None}


# ---------------------------------------------------------------------------------- generated


@pytest.mark.parametrize('name,text,output', ROWS, ids=[f'{r[0]}-{r[1]}' for r in ROWS])
def test_generated_answer(name, text, output):
    assert generated.RECIPES[name].answer(text) == output


def test_every_generated_task_has_worked_examples():
    counts = {name: sum(row[0] == name for row in ROWS) for name in generated.RECIPES}
    assert {name: n for name, n in counts.items() if n < 2} == {}
    assert len(generated.RECIPES) >= 60


@pytest.mark.parametrize('name', generated.RECIPES)
def test_generated_task(name):
    task = generated.generate(name, seed=1, train=40, test=10)
    train, test = ([e.input for e in split] for split in (task.train, task.test))
    assert len(train) == 40 and len(test) == 10
    assert len({*train, *test}) == 50
    for example in (*task.train, *task.test):
        assert example.input.strip() == example.input and '\n' not in example.input
        assert example.output.strip() and len(example.output) <= 60
    assert task == generated.generate(name, seed=1, train=40, test=10)
    assert task.train != generated.generate(name, seed=2, train=40, test=10).train
    # More training examples change neither the test nor the examples there were.
    longer = generated.generate(name, seed=1, train=50, test=10)
    assert longer.test == task.test and longer.train[:40] == task.train
    assert len({e.output for e in task.train}) > 1


def test_generated_siblings_share_inputs():
    """So only the description can tell them apart; and no test input is trained on by a sibling."""
    by_domain = {}
    for name, recipe in generated.RECIPES.items():
        task = generated.generate(name, train=100, test=20)
        inputs = [[e.input for e in split] for split in (task.train, task.test)]
        assert by_domain.setdefault(recipe.domain, inputs) == inputs
    outputs = [tuple(e.output for e in generated.generate(n).test) for n in generated.RECIPES]
    assert len(set(outputs)) == len(outputs)


def test_generated_small_domain_and_unknown_name():
    task = generated.generate('superlative')
    assert len(task.test) == len(generated.DOMAINS['adjective']) // 5
    assert len(task.train) + len(task.test) == len(generated.DOMAINS['adjective'])
    with pytest.raises(UserError, match="unknown generated task 'nope'"):
        generated.generate('nope')


def test_words_are_of_one_kind():
    words = [word for kind in generated._WORDS.values() for word in kind]
    assert len(set(words)) == len(words)


def test_verb_forms_follow_the_rules_of_doubling():
    """inflect and our own rules agree on which verbs double their last consonant."""
    for verb in generated.DOMAINS['verb']:
        past = generated.RECIPES['past_tense'].answer(verb)
        ing = generated.RECIPES['ing_form'].answer(verb)
        if past.startswith(verb) and past.endswith('ed') and not verb.endswith(('e', 'y')):
            assert past.removesuffix('ed') == ing.removesuffix('ing'), verb


# ---------------------------------------------------------------------------------- descriptions


def normal(text):
    """A description without case, blanks and final marks."""
    return re.sub(r'\s+', ' ', text.lower()).strip(' .?!:')


def words(text):
    return frozenset(re.findall(r'\w+', text.lower()))


def test_own_descriptions():
    owner = {}
    for path in tasks.DESCRIPTIONS.glob('*.yaml'):
        train, test = tasks.own_descriptions(path.stem)
        few = path.stem in benchmarks.BENCHMARKS or path.stem.startswith('ii_')
        # Instruction Induction has some of its own, of which every fourth is kept for testing.
        assert len(test) >= (0 if path.stem.startswith('ii_') else 4), path.stem
        assert len(train) + len(test) >= (8 if few else 16), path.stem
        for text in (*train, *test):
            assert owner.setdefault(normal(text), path.stem) == path.stem, text
        kept = {words(text) for text in test}
        assert not [text for text in train if words(text) in kept], path.stem
    assert len(owner) == sum(
        len(part)
        for p in tasks.DESCRIPTIONS.glob('*.yaml')
        for part in tasks.own_descriptions(p.stem)
    )
    assert generated.RECIPES.keys() <= set(owner.values())


def test_descriptions_do_not_quote_test_examples():
    for name in generated.RECIPES:
        task = generated.generate(name)
        texts = ' '.join((*task.descriptions, *task.test_descriptions))
        # Words of a domain of words may stand in a description as what they mean.
        quoted = [e.input for e in task.test if ' ' in e.input and e.input in texts]
        assert not quoted, name


def test_given_descriptions_are_split():
    given = [f'number {i}' for i in range(tasks.FEW_DESCRIPTIONS)]
    train, test = tasks.split_descriptions(given)
    assert test[:2] == ('number 3', 'number 7') and len(test) == len(given) // 4
    assert sorted(train + test) == sorted(given)
    few = tasks.describe('fv_antonym', given[:4])
    many = tasks.describe('fv_antonym', given)
    own = tasks.own_descriptions('fv_antonym')
    assert few['descriptions'] == ('number 0', 'number 1', 'number 2', *own[0])
    assert few['test_descriptions'] == ('number 3', *own[1])
    assert many == {'descriptions': train, 'test_descriptions': test}


# ---------------------------------------------------------------------------------- readers


def test_read_json(tmp_path):
    write(tmp_path / 'b.json', json_task())
    write(tmp_path / 'a.json', json_task(name='other'))
    other, task = tasks.read_json(str(tmp_path))
    assert (other.name, task.name, task.source, task.license) == (
        'other',
        'opposites',
        'made up',
        'MIT',
    )
    assert task.train == (Example('up', ('down',)), Example('left', ('right', 'right-hand')))
    assert task.train[1].output == 'right'
    assert task.test == (Example('in', ('out',)),)
    assert task.test_descriptions == ('Contrary?',)


def test_read_json_joins_answers_and_keeps_test_inputs_apart(tmp_path):
    file = write(
        tmp_path / 'rhymes.json',
        json_task(
            train=examples(('cat', 'hat'), ('dog', 'log'), ('cat', 'bat'), ('sun', 'fun')),
            test=examples(('sun', 'run'), ('sun', 'gun')),
        ),
    )
    (task,) = tasks.read_json(file)
    assert task.train == (Example('cat', ('hat', 'bat')), Example('dog', ('log',)))
    assert task.test == (Example('sun', ('run', 'gun')),)


@pytest.mark.parametrize(
    'change,message',
    [
        ({'name': 300 * 'n'}, r'bad\.json: a name has at most 200 bytes'),
        ({'license': None}, r"bad\.json: no 'license'; found: name, source"),
        ({'train': 'x'}, r"bad\.json: 'train' is of type str"),
        ({'train': ['x']}, r"train\[0\]: expected a mapping with 'input', found str"),
        ({'train': [{'input': 'x'}]}, r"train\[0\]: no 'output'"),
        ({'train': examples(('a', 'b'), (' ', 'c'))}, r'train\[1\]: the input is empty'),
        ({'train': examples(('a', ''))}, r"train\[0\]: an output must be text, found ''"),
        ({'train': examples(('a', []))}, r'train\[0\]: an output must be text'),
        (
            {'train': examples(('a', 'b'), ('a', 'b'))},
            r'train\[1\]: the same example as .*train\[0',
        ),
        ({'train': examples(('in', 'out'))}, r"train\[0\]: also a test example: 'in'"),
        ({'descriptions': ['x', '']}, r'descriptions\[1\]: a description must be text'),
        ({'descriptions': ['x', 'x ']}, r'descriptions\[1\]: the same description as \[0\]'),
    ],
)
def test_read_json_bad(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        tasks.read_json(write(tmp_path / 'bad.json', json_task(**change)))


def test_malformed_files(tmp_path):
    with pytest.raises(UserError, match=r'x\.json, line 2: not JSON'):
        tasks.read_json(write(tmp_path / 'x.json', '{"name": "x",\n oops}'))
    with pytest.raises(UserError, match=r'x\.json: cannot be read'):
        tasks.read_json(write(tmp_path / 'x.json', 100_000 * '['))
    with pytest.raises(UserError, match=r'x\.yaml, line 3: not YAML'):
        tasks.parse(pathlib.Path(write(tmp_path / 'x.yaml', 'a:\n  - b\n  c: d: e\n')))
    with pytest.raises(UserError, match=r'no \*\.json there'):
        tasks.read_json(str(tmp_path / 'empty'))


def instructions(path, name, count=103, **changes):
    content = {
        'Definition': ['Double the number.'],
        'Positive Examples': [{'input': 'two', 'output': 'four', 'explanation': ''}],
        'Negative Examples': [],
        'Instances': [{'input': str(i), 'output': [str(2 * i)]} for i in range(count)],
        'Instance License': ['CC0'],
        **changes,
    }
    return write(path / 'tasks' / f'{name}.json', content)


def test_read_natural_instructions(tmp_path):
    instructions(tmp_path, 'task1_double')
    instructions(tmp_path, 'task2_old', 101, Definition='Twice.')
    write(tmp_path / 'splits/default/train_tasks.txt', 'task2_old\n')
    double, old = tasks.read_natural_instructions(str(tmp_path))
    assert (double.name, double.license) == ('task1_double', 'CC0')
    assert double.descriptions == ('Double the number.',)
    assert [e.input for e in double.test] == [str(i) for i in range(100)]
    assert double.train[0] == Example('two', ('four',))
    assert [e.output for e in double.train[1:]] == ['200', '202', '204']
    assert old.descriptions == ('Twice.',)
    (only,) = tasks.read_natural_instructions(str(tmp_path), 'default/train_tasks')
    assert only == old
    with pytest.raises(UserError, match='no such split'):
        tasks.read_natural_instructions(str(tmp_path), 'default/none')
    for change, message in (
        ({'Instances': None}, "'Instances' is of type NoneType"),
        ({'Instance License': 'MIT'}, "'Instance License' is of type str"),
        ({'Definition': []}, 'Definition is empty'),
    ):
        instructions(tmp_path, 'task3_bad', **change)
        with pytest.raises(UserError, match=f'task3_bad.json: {message}'):
            tasks.read_natural_instructions(str(tmp_path))


def metadata(path, **changes):
    content = {
        'descriptions': ['Multiply by two.', 'Twice as much.', 'Double it.'],
        'ds_kwargs': {'path': 'Somewhere/task1_double', 'split': 'train[:10]'},
        'user_prompt_template': '{task_def}\n\n{problem}',
        'response_field': 'answer',
        **changes,
    }
    write(path / 'tasks/lol_001/metadata.yaml', yaml.safe_dump(content))


def test_read_text_to_lora(tmp_path):
    instructions(tmp_path / 'ni', 'task1_double')
    metadata(tmp_path)
    read = lambda: tasks.read_text_to_lora(str(tmp_path), str(tmp_path / 'ni'), (), 1)  # noqa: E731
    (task,) = read()
    assert task.name == 'lol_001'
    assert task.descriptions == ('Multiply by two.', 'Twice as much.')
    assert task.test_descriptions == ('Double it.',)
    assert task.test[3] == Example('Double the number.\n\n3', ('6',))
    for template in ('{question}', '{problem', '{problem.text}', '{problem[a]}'):
        metadata(tmp_path, user_prompt_template=template)
        with pytest.raises(UserError, match='lol_001/metadata.yaml: cannot fill user_prompt_temp'):
            read()
    metadata(tmp_path, ds_kwargs={'path': 'Somewhere/task9'})
    with pytest.raises(UserError, match="its data set 'Somewhere/task9' is not at"):
        read()
    metadata(tmp_path, descriptions=['a'])
    with pytest.raises(UserError, match='1 descriptions, of which 1 for test'):
        read()


def test_records(tmp_path):
    written = [generated.generate(n, train=20, test=5) for n in ('uppercase', 'number_in_french')]
    records.write_records(written, str(tmp_path))
    with pytest.raises(UserError, match='already there'):
        records.write_records(written[:1], str(tmp_path))
    french, upper = records.read_records(str(tmp_path))
    assert (upper.name, upper.license) == ('uppercase', 'Apache-2.0')
    assert upper.descriptions == written[0].descriptions
    assert upper.test_descriptions == written[0].test_descriptions
    assert tuple(french.train) == written[1].train
    dataset = grain.MapDataset.source(pickle.loads(pickle.dumps(upper.test))).map(
        lambda e: e.output
    )
    assert list(dataset) == [e.output for e in written[0].test]
    with pytest.raises(UserError, match='no records'):
        records.read_records(str(tmp_path / 'none'))
    with pytest.raises(UserError, match="task 'uppercase' .* lacks train or test"):
        empty = dataclasses.replace(written[0], test=())
        records.write_records([empty], str(tmp_path / 'new'))
    for name in (
        'dataset_info.json',
        'metadata.json',
        'text_task-test.array_record-00000-of-00001',
    ):
        path = tmp_path / 'text_task/uppercase/1.0.0' / name
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match='uppercase.*damaged.*write them again'):
            records.read_records(str(tmp_path))
        path.write_bytes(whole)


RECORDS = {
    'arc_easy': (
        {
            'question': b'Which is hot?',
            'choices': {'text': [b'ice', b'fire', b'snow'], 'label': [2, 0, 1]},
            'answerKey': 0,
        },
        Example('Which is hot?\nA: ice\nB: fire\nC: snow', ('B',)),
    ),
    'boolq': (
        {'passage': b'Fire is hot.', 'question': b'is fire cold', 'answer': False},
        Example('Fire is hot.\nQuestion: is fire cold?', ('false',)),
    ),
    'gsm8k': (
        {'question': b'2 and 3?', 'answer': b'2+3=5 #### 5', 'short_answer': b'5'},
        Example('2 and 3?', ('5',)),
    ),
    'hellaswag': (
        {'context': b'She runs', 'endings': [b'off.', b'blue.', b'is.', b'up.'], 'label': 3},
        Example('She runs\nA: off.\nB: blue.\nC: is.\nD: up.', ('D',)),
    ),
    'openbookqa': (
        {
            'question': {'stem': b'Fire is', **{f'choice_{x}': x.lower() for x in 'ABCD'}},
            'answerKey': 2,
        },
        Example('Fire is\nA: a\nB: b\nC: c\nD: d', ('C',)),
    ),
    'piqa': (
        {'goal': b'Cool down', 'sol1': b'swim', 'sol2': b'run', 'label': 0},
        Example('Cool down\nA: swim\nB: run', ('A',)),
    ),
    'winogrande': (
        {'sentence': b'Ann saw Eve, so _ waved.', 'option1': b'Ann', 'option2': b'Eve', 'label': 1},
        Example('Ann saw Eve, so _ waved.\nA: Ann\nB: Eve', ('B',)),
    ),
}


@pytest.mark.parametrize('name', RECORDS)
def test_benchmark_example(name):
    record, example = RECORDS[name]
    assert benchmarks.BENCHMARKS[name].example(record) == example


@pytest.mark.parametrize('name', sorted(set(benchmarks.BENCHMARKS) - {'arc_easy', 'arc_challenge'}))
def test_benchmark_of_mock_data(name):
    """Random records of the features that tfds declares (of ARC's, the answer is not a choice)."""
    if module := benchmarks.BENCHMARKS[name].module:
        __import__(f'tensorflow_datasets.{module}')
    with tfds.testing.mock_data(num_examples=3):
        builder = tfds.builder(benchmarks.BENCHMARKS[name].dataset, try_gcs=False)
        record = dict(builder.as_data_source('train')[0])
        if name == 'hellaswag':
            record['label'] = 1  # an integer of any size to tfds
        example = benchmarks.BENCHMARKS[name].example(record)
    assert example.input and example.output


def test_benchmark_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="unknown benchmark 'mbpp'"):
        benchmarks.read_benchmarks(('mbpp',))


# ---------------------------------------------------------------------------------- collections


def collection(*sources):
    return collect(ConfigDict({'sources': sources}))


def test_collect(tmp_path):
    write(tmp_path / 'opposites.json', json_task())
    some = {'reader': 'generated', 'names': ('plural', 'surname'), 'train': 20, 'test': 5}
    found = collection(
        {'reader': 'json', 'path': str(tmp_path)}, {**some, 'held_out': ('surname',)}
    )
    assert [task.name for task in found.train] == ['opposites', 'plural']
    assert [task.name for task in found.held_out] == ['surname']
    for source, message in [
        ({'reader': 'xml'}, "unknown reader of tasks 'xml'; known: json"),
        ({'reader': 'json'}, "arguments of the reader 'json' of tasks: missing.*'path'"),
        ({**some, 'held_out': ('nope',)}, "held-out tasks that .*'generated' did not find: nope"),
    ]:
        with pytest.raises(UserError, match=message):
            collection(source)
    with pytest.raises(UserError, match="two tasks are named 'plural'"):
        collection(some, some)
    with pytest.raises(UserError, match='largest_number held out, but larger_of_pair trained on'):
        collection({'reader': 'generated', 'held_out': ('largest_number',)})
    write(tmp_path / 'opposites.json', json_task(train=[]))
    with pytest.raises(UserError, match="task 'opposites' of made up lacks train or test"):
        collection({'reader': 'json', 'path': str(tmp_path)})
    write(tmp_path / 'opposites.json', json_task(descriptions=[]))
    with pytest.raises(UserError, match="task 'opposites' of made up has no description"):
        collection({'reader': 'json', 'path': str(tmp_path)})


def test_what_a_task_tests_is_not_trained_on_under_another_name(tmp_path):
    tasks = {
        'one': {'train': examples(('a', 'b'), ('c', 'd')), 'test': examples(('e', 'f'))},
        'two': {
            'train': examples(('e', 'f'), ('g', 'h'), ('i', 'j')),
            'test': examples(('c', 'd')),
        },
        'held': {'train': examples(('k', 'l')), 'test': examples(('g', 'h'), ('a', 'm'))},
    }
    for name, parts in tasks.items():
        write(tmp_path / f'{name}.json', json_task(name=name, **parts))
    source = {'reader': 'json', 'path': str(tmp_path), 'held_out': ('held',)}
    pairs = {t.name: [(e.input, e.output) for e in t.train] for t in collection(source).train}
    assert pairs == {'one': [('a', 'b')], 'two': [('i', 'j')]}
    write(tmp_path / 'three.json', json_task(name='three', train=examples(('c', 'd'))))
    with pytest.raises(UserError, match="all training examples of task 'three'.*another task"):
        collection(source)


def test_proposed_hold_out_of_generated_tasks():
    source = {'reader': 'generated', 'train': 20, 'test': 5, 'held_out': HELD_OUT['generated']}
    found = collection(source)
    assert {task.name for task in found.held_out} == set(HELD_OUT['generated'])
    assert len(found.train) + len(found.held_out) == len(generated.RECIPES)


def test_a_folder_may_lack_the_tasks_to_hold_out(tmp_path):
    write(tmp_path / 'fv_antonym.json', json_task(name='fv_antonym'))
    write(tmp_path / 'opposites.json', json_task())
    sources = t2l_config(f'smollm2,{tmp_path}').data.sources
    found = collection(sources[0])
    assert [task.name for task in found.held_out] == ['fv_antonym']
    assert [task.name for task in found.train] == ['opposites']
    (alone,) = t2l_config('after_codes,records:a').data.sources
    assert alone == {'reader': 'records', 'path': 'a'}
    (other,) = t2l_config('mistral_7b,text_to_lora:a:b').data.sources
    assert other == {'reader': 'text_to_lora', 'path': 'a', 'instructions': 'b'}
    with pytest.raises(UserError, match="a source of tasks must be a mapping.*'json'"):
        collection('json')
    with pytest.raises(UserError, match='at most 3 fields.*smollm2,a,b,c'):
        t2l_config('smollm2,a,b,c')


def test_shared_tasks():
    """Everything in the folder can be read, described and collected with the proposed hold-out."""
    found = collection(
        {'reader': 'json', 'path': shared_tasks(), 'held_out': HELD_OUT['json']},
        {'reader': 'generated', 'held_out': HELD_OUT['generated']},
    )
    names = {task.name for task in (*found.train, *found.held_out)}
    assert set().union(*SAME_TASK) <= names
    assert len(found.held_out) >= 12
    described = {}
    for task in (*found.train, *found.held_out):
        assert len(task.descriptions) >= 6 and len(task.test_descriptions) >= 2, task.name
        for text in (*task.descriptions, *task.test_descriptions):
            assert described.setdefault(normal(text), task.name) == task.name, text
        trained = {example.input for example in task.train}
        assert not any(example.input in trained for example in task.test)


@pytest.mark.parametrize(
    'text, wanted',
    [
        ('tasks/mine', {'reader': 'json', 'path': 'tasks/mine'}),
        ('json,a', {'reader': 'json', 'path': 'a'}),
        ('benchmarks', {'reader': 'benchmarks', 'names': ()}),
        ('benchmarks,boolq,piqa', {'reader': 'benchmarks', 'names': ('boolq', 'piqa')}),
        (
            'natural_instructions,a,default/test_tasks',
            {'reader': 'natural_instructions', 'path': 'a', 'split': 'default/test_tasks'},
        ),
        ('parametric', {'reader': 'parametric'}),
    ],
)
def test_collections_on_the_command_line(text, wanted):
    assert collections.source(text) == wanted


def test_too_much_on_the_command_line():
    with pytest.raises(UserError, match='name the tasks as records,PATH, not'):
        collections.source('records,a,b')
